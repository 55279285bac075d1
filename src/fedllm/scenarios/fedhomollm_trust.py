"""Who learns what in FedHomoLLM, in sentences that a security officer can hold a job to."""

from __future__ import annotations

from fedllm.privacy.settings import PrivacySettings
from fedllm.scenarios.fedhomollm_settings import Settings, meets_drift, rule_of

_PARTY = {
    False: "The server is trusted with the sum of the clipped updates: it adds the noise that hides whole parties "
    "before anyone else sees it (E08).",
    True: "Each party adds its share of the noise that hides whole parties; the server sees the sum with all of it. "
    "Parties that work together with the server can take their own shares away.",
}


def who_learns_what(settings: Settings, privacy: PrivacySettings) -> tuple[str, ...]:
    """Return it for one job.

    Args:
        settings: The scenario's.
        privacy: The job's `privacy` section.
    """
    beside = ", and its control variate" if settings.strategy.name == "SCAFFOLD" else ""
    beside += ", and a random projection of its adapter" if meets_drift(settings) else ""
    own = " Factor B stays at its party, and neither the server nor another party ever sees it."
    noise = (
        "Each party adds its noise before anything leaves, and its updates tell of a unit (example or person) no more "
        "than epsilon says. Not hidden: numbers of examples, sums of held-out losses, and when a party answers."
    )
    found = (
        _server(privacy, beside),
        "Each party sees the global adapter after every round; never another party's update or data."
        + (own if rule_of(settings).keeps_state else ""),
        "Rows, prompts and completions never leave a party. "
        + ("What is summed" if privacy.secure_aggregation.enabled else "Updates")
        + " can leak something of them: see the threat model.",
    )
    asked = privacy.differential_privacy
    if asked.unit == "party":
        return (*found, _PARTY[asked.placement == "distributed"])
    return (*found, noise) if asked.is_local else found


def _server(privacy: PrivacySettings, beside: str) -> str:
    if not privacy.secure_aggregation.enabled:
        return (
            f"The server sees each party's update{beside}, its losses and counts, and the global adapter "
            "(no secure aggregation)."
        )
    return (
        f"The server sees the weighted sum of the parties' updates{beside.replace('its', 'their')}, the sums of losses "
        "and counts, who is in each sum, and the global adapter; of no party anything by itself, unless "
        + _accomplices(privacy.secure_aggregation.threshold)
    )


def _accomplices(threshold: int | None) -> str:
    """Return how many parties that work together with the server can open another's part of a sum."""
    if threshold is None:
        return "more than a third of those who began a sum work together with it."
    return (
        f"{threshold} parties work together with it; with a server that also lies to them, twice {threshold} less "
        "those who began the sum are enough."
    )
