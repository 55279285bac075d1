"""What FedHomoLLM cannot be asked together with privacy, as (key, what, fix)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedllm.privacy.differential import DifferentialPrivacySettings
from fedllm.privacy.secure_sum import LEAST_PARTIES, least_of
from fedllm.privacy.settings import SecureAggregationSettings
from fedllm.scenarios.base import Clash
from fedllm.scenarios.fedhomollm_settings import Settings

# Codec -> why what parties send in it has no sum that opens to the bits of the plain one.
_NO_SUM = {
    "bf16": "each party rounds its values to bf16's own steps, which are no common grid, so they have no exact sum",
    "int8": "the scales of int8 differ from party to party, so its codes have no sum",
    "int4": "the scales of int4 differ from party to party, so its codes have no sum",
    "TopK": "the places of TopK differ from party to party, so what is sent has no sum",
    "RandomK": "all parties send the same places of RandomK, but as floats, which have no common grid in this version",
}


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
    if asked.unit == "party":
        yield from _clashes_of_parties(settings, asked)


def clashes_of_shares(
    settings: Settings, asked: DifferentialPrivacySettings, secure: SecureAggregationSettings, parties: Sequence[str]
) -> Iterator[Clash]:
    """Yield what noise that is shared among the parties does not go with.

    Args:
        settings: The scenario's.
        asked: The job's `privacy.differential_privacy`.
        secure: The job's `privacy.secure_aggregation`.
        parties: Its parties.
    """
    if asked.placement != "distributed":
        return
    cohort = settings.cohort_size(len(parties))
    stay = least_of(cohort, threshold=secure.threshold, fewest=settings.min_parties)
    if (asked.colluders or 0) >= stay:
        what = f"colluders is {asked.colluders}, and a sum may be of {stay} parties: nobody's noise would be left (E09)"
        yield "privacy.differential_privacy.colluders", what, f"set it to {stay - 1} at most, or raise `threshold`"
    if not secure.enabled:
        what = "each party's share of the noise is too little to hide its update from a server that sees it (E09)"
        fix = "set `privacy.secure_aggregation.enabled: true`, or `placement: central`"
        yield "privacy.differential_privacy.placement", what, fix


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
    if settings.codec.name in _NO_SUM:
        what = f"{_NO_SUM[settings.codec.name]} (E02)"
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


def _clashes_of_parties(settings: Settings, asked: DifferentialPrivacySettings) -> Iterator[Clash]:
    """Yield what would tell of a whole party beside the noisy sum of clipped updates."""
    if settings.weight_by != "equal":
        what = f"with `weight_by: {settings.weight_by}` a party's part of the sum has no bound (E05)"
        yield "federation.weight_by", what, "set `weight_by: equal`"
    if settings.keep == "best":
        what = "`keep: best` chooses by held-out losses, which have had no noise"
        yield "federation.keep", what, "set `keep: last`"
    if settings.drift_meter:
        what = "the drift meter's projections of a party's adapter have had no noise (E06)"
        yield "federation.drift_meter", what, "set `drift_meter: false`"
    if settings.strategy.name == "SCAFFOLD":
        what = "SCAFFOLD's control variates are neither clipped nor noisy (E06)"
        yield "federation.strategy", what, "set another `strategy`"
    if settings.codec.name not in ("fp32", "Grid") or settings.codec.error_feedback:
        what = f"after {settings.codec.name} an update is no longer within clip_norm (E06)"
        yield "federation.codec", what, "set `codec: {name: fp32}`, or Grid, without error feedback"
    if settings.lora_rule not in ("FedIT", "FFA-LoRA", "RoLoRA") or settings.robust.name != "none":
        what = (
            "noise on the sum does not hide a party from a rule that sees its update, or a model that is its own (E06)"
        )
        yield "privacy.differential_privacy.unit", what, "set `lora_rule: FedIT`, FFA-LoRA or RoLoRA, and no `robust`"
    if asked.placement == "distributed" and settings.codec.name != "Grid":
        what = "noise in whole numbers needs updates in whole numbers (E09)"
        yield "federation.codec", what, "set `codec: {name: Grid, limit: ...}`"
