"""Checkpoints: one file per round, digest first, a few generations kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import PayloadError, StateLost
from fedllm.runs.jsonl import sync_folder, write_atomic
from fedllm.scenarios.base import State
from fedllm.wire.frame import check_finite, decode, encode, from_bytes, to_bytes
from fedllm.wire.payload import Envelope, Payload, Tensors

_MAGIC = b"FLMS"
_HEAD_BYTES = len(_MAGIC) + 32


class Saved(Payload):
    """A half's state as it is written to disk."""

    fields: dict[str, Any]
    tensors: Tensors


@dataclass(frozen=True)
class Generations:
    """The newest checkpoints of one half (the server, or a party) of one run."""

    folder: Path
    owner: str
    job_digest: str
    run_id: str
    keep: int = 2

    def save(self, state: State) -> str:
        """Write a state durably, drop the oldest generation, and return the file's SHA-256.

        Args:
            state: What to keep.

        Raises:
            PayloadError: `NONFINITE`; such a state could not be loaded again.
            ResourceError: `DISK_FULL`.
        """
        check_finite(state.tensors, sender=self.owner)
        self.folder.mkdir(parents=True, exist_ok=True)
        body = to_bytes(encode(Saved(fields=state.fields, tensors=state.tensors), self._envelope(state.round)))
        digest = hashlib.sha256(body)
        write_atomic(self._path(state.round), _MAGIC + digest.digest() + body)
        for old in self.present()[self.keep :]:
            self._path(old).unlink(missing_ok=True)
        return digest.hexdigest()

    def present(self) -> list[int]:
        """Return the rounds that have a file, damaged or not, newest first."""
        stems = (path.stem.removeprefix("round-") for path in self.folder.glob("round-*.ckpt"))
        return sorted((int(stem) for stem in stems if stem.isdigit()), reverse=True)

    def valid(self) -> list[int]:
        """Return the rounds whose file is whole and of this run, newest first."""
        return [number for number in self.present() if self._body(number) is not None]

    def load(self, number: int) -> State:
        """Return the state of a round.

        Args:
            number: The round.

        Raises:
            StateLost: `STATE_CORRUPT`, the file is damaged, missing or of another run.
        """
        body = self._body(number)
        if body is None:
            raise StateLost("STATE_CORRUPT", f"the checkpoint of round {number} is damaged", where=str(self.folder))
        saved = decode(from_bytes(body, max_bytes=len(body)), {"Saved": Saved})
        assert isinstance(saved, Saved)  # noqa: S101
        return State(number, saved.tensors, saved.fields)

    def digest(self, number: int) -> str:
        """Return the SHA-256 that `save` returned for a round, or an empty string if its file is not whole.

        Args:
            number: The round.
        """
        body = self._body(number)
        return hashlib.sha256(body).hexdigest() if body is not None else ""

    def forget_after(self, number: int) -> None:
        """Remove the checkpoints of later rounds.

        Args:
            number: The last round to keep.
        """
        for later in [present for present in self.present() if present > number]:
            self._path(later).unlink(missing_ok=True)
        if self.folder.exists():
            sync_folder(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}.ckpt"

    def _envelope(self, number: int) -> Envelope:
        return Envelope(
            job_digest=self.job_digest,
            run_id=self.run_id,
            round=number,
            sequence=0,
            sender=self.owner,
            recipient=self.owner,
        )

    def _body(self, number: int) -> bytes | None:
        try:
            data = self._path(number).read_bytes()
            body = data[_HEAD_BYTES:]
            whole = data[:_HEAD_BYTES] == _MAGIC + hashlib.sha256(body).digest()
            if whole and from_bytes(body, max_bytes=len(body)).envelope == self._envelope(number):
                return body
        except (OSError, PayloadError):
            pass
        return None
