"""What FedHomoLLM cannot be asked together with privacy, as (key, what, fix)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedllm.privacy.differential import DifferentialPrivacySettings
from fedllm.privacy.secure_sum import LEAST_PARTIES
from fedllm.privacy.settings import SecureAggregationSettings

if TYPE_CHECKING:
    from fedllm.scenarios.fedhomollm_settings import Clash, Settings


def clashes_of_noise(settings: Settings, asked: DifferentialPrivacySettings) -> Iterator[Clash]:
    """Yield what noise in training does not go with.

    SCAFFOLD's control variates, error feedback, drift vectors and all that servers do are functions of what has had
    its noise already, so they are none of it (E06).

    Args:
        settings: The scenario's.
        asked: The job's `privacy.differential_privacy`.
    """
    if asked.is_local and settings.weight_by == "tokens":
        what = "`weight_by: tokens` tells the number of a party's target tokens, which has had no noise (E05)"
        yield "federation.weight_by", what, "set `weight_by: examples` (their number is public), or `equal`"


def clashes_of_sums(
    settings: Settings, secure: SecureAggregationSettings, parties: Sequence[str], *, needs_each: str
) -> Iterator[Clash]:
    """Yield what secure aggregation does not go with: what a sum alone does not give, and sums that hide nobody.

    Args:
        settings: The scenario's.
        secure: The job's `privacy.secure_aggregation`.
        parties: Its parties.
        needs_each: The rule that must see each update, if there is one; else empty.
    """
    key, off = "privacy.secure_aggregation", "or set `privacy.secure_aggregation.enabled: false`"
    if needs_each:
        what = f"{needs_each} needs each party's update, and secure aggregation shows none (E01)"
        yield key, what, f"set `robust: {{name: none}}` and `lora_rule: FedIT`, FFA-LoRA or RoLoRA, {off}"
    if settings.codec.name not in ("fp32", "Grid"):
        what = f"the scales or places of {settings.codec.name} differ from party to party, so codes have no sum (E02)"
        yield "federation.codec", what, "set `codec: {name: Grid, limit: ...}` or fp32"
    if settings.ranks:
        what = "with parties of different ranks the parts of the sum are not of one shape"
        yield "federation.ranks", what, f"leave `ranks` out, {off}"
    cohort = settings.cohort_size(len(parties))
    if cohort < LEAST_PARTIES:
        what = f"a sum of {cohort} parties hides nobody: {LEAST_PARTIES} are the least (E04)"
        yield key, what, f"add parties, or raise fraction_train or min_parties, {off}"
    elif secure.threshold is not None and not cohort < 2 * secure.threshold <= 2 * cohort:
        what = f"threshold is {secure.threshold}, and of {cohort} parties more than half must stay, and can (E04)"
        yield f"{key}.threshold", what, f"set `threshold` between {cohort // 2 + 1} and {cohort}, or leave it out"
