"""What FedHomoLLM cannot be asked together with privacy, as (key, what, fix)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedllm.privacy.differential import DifferentialPrivacySettings

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
