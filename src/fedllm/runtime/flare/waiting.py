"""A party whose base model is still to come: it takes the package from its owner, and is opened with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import ModelError
from fedllm.runs.folder import RunFolder
from fedllm.runtime.base import Ready
from fedllm.runtime.flare.desk import Answers
from fedllm.runtime.host import PartyHost
from fedllm.runtime.package_party import Taker
from fedllm.scenarios.base import ClientHalf, Log
from fedllm.wire.frame import Parcel


@dataclass
class Waiting:
    """Answers what brings the package, and nothing else, until the package is there.

    Args:
        host: Of a party without a model; it has the taker at its desk.
        taker: Takes the package.
        run: The run folder, in which this process holds the party's.
        open_: Opens the party with the package in a folder.
    """

    host: PartyHost
    taker: Taker
    run: RunFolder
    open_: Callable[[Path], Answers]
    _then: Answers | None = None

    def handle(self, parcel: Parcel, *, timeout_s: float) -> Parcel:
        """Return the answer to one message.

        Args:
            parcel: The message.
            timeout_s: Time to answer, in seconds.
        """
        if self._then is None and self.taker.folder is not None:
            self.host.blobs.forget()
            self._then = self.open_(self.taker.folder)
        return (self._then or self.host).handle(parcel, timeout_s=timeout_s)

    def close(self) -> None:
        """Let go of the party's folder, and of what is on its way."""
        self.taker.close()
        self.run.close()
        if self._then is not None:
            self._then.close()


def no_client(log: Log) -> ClientHalf:
    """Raise: there is no model that a client half could use.

    Args:
        log: Not used.

    Raises:
        ModelError: `MODEL_NOT_FOUND`.
    """
    raise _missing()


def not_ready(rounds: list[int]) -> Ready:
    """Raise: there is no model whose digest could be told.

    Args:
        rounds: Not used.

    Raises:
        ModelError: `MODEL_NOT_FOUND`.
    """
    raise _missing()


def _missing() -> ModelError:
    what = "the package is not at this site, and its owner did not send it"
    fix = "see that the owner is connected; or copy the package here, where the job or party.yaml names it"
    return ModelError("MODEL_NOT_FOUND", what, where="model.model_name_or_path", fix=fix)
