"""FedOST: who learns what, and who gets what, in sentences."""

from __future__ import annotations

from fedllm.privacy.settings import PrivacySettings
from fedllm.scenarios.fedhomollm_trust import who_learns_what as who_learns_what_in_averaging
from fedllm.scenarios.fedost_settings import Settings

_AT_OWNER = {
    "model": "the whole tuned model",
    "adapter": "the tuned outer layers",
    "nothing": "nothing",
}
_AT_CLIENTS = {
    "adapter": "the adapter for their emulator",
    "service": "the use of the owner's model as a service, and no file",
    "nothing": "nothing",
}

_PACKAGE = {
    "send": "The package goes once through the server to each party that lacks it, sealed for these parties: the "
    "server sees its config, and the names, sizes and digests of its files.",
    "copied": "The package does not go over the wire: each site has its own copy.",
}


def delivered(settings: Settings) -> str:
    """Return what each side gets, as a sentence.

    Args:
        settings: The scenario's.
    """
    to_owner, to_clients = _AT_OWNER[settings.deliver_to_owner], _AT_CLIENTS[settings.deliver_to_clients]
    return f"{settings.owner}, the owner, gets {to_owner}; the other parties get {to_clients}."


def _on_realignment(settings: Settings) -> tuple[str, ...]:
    if not settings.realign_every:
        return ()
    every = "every round" if settings.realign_every == 1 else f"every {settings.realign_every} rounds"
    return (
        f"After {every} {settings.owner} distils the emulator further on its public text. The server and the other "
        f"parties see the correction, of rank {settings.correction_rank} for each linear layer of the emulator's "
        f"middle, two losses of it on that text, and whether {settings.owner}'s export policy forbade it.",
    )


def who_learns_what(settings: Settings, privacy: PrivacySettings) -> tuple[str, ...]:
    """Return it for one job, in sentences.

    Args:
        settings: The scenario's.
        privacy: The job's `privacy` section.
    """
    return (
        f"{settings.owner} keeps its whole model. The other parties hold the package: its embeddings, head and outer "
        "layers exactly, and of its middle an emulator. Nothing hides those outer layers from them, and what can be "
        "learnt back of the middle is what `fedllm emulator check` measures.",
        _PACKAGE[settings.package],
        f"{settings.owner} sees the global adapter when it plugs it in, never a single party's update or data; the "
        "server sees two losses of its probe set, and nothing else of it.",
        *_on_realignment(settings),
        f"At the end: {delivered(settings)} While they train, the other parties hold each round's global adapter.",
        *who_learns_what_in_averaging(settings, privacy),
    )
