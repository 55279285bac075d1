"""Checkpoints: one file per round, a digest over all of it, a few generations kept."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.disk import sync_folder, write_atomic_parts
from fedllm.errors import PayloadError, StateLost
from fedllm.scenarios.base import State
from fedllm.wire.blob import FileBlob, parts_of, write_parts
from fedllm.wire.frame import Frame, Parcel, check_finite, decode, pack, read_head, unpack
from fedllm.wire.payload import Envelope, Payload, TensorMap

_MAGIC = b"FLMS"
_START = len(_MAGIC) + 32
_NO_DIGEST = "0" * 64


def _started(head: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(head).digest() + head


class Saved(Payload):
    """A half's state as it is written to disk."""

    fields: dict[str, Any]
    tensors: TensorMap


@dataclass(frozen=True)
class Generations:
    """The newest checkpoints of one half (the server, or a party) of one run."""

    folder: Path
    owner: str
    job_digest: str
    run_id: str
    keep: int = 2

    def save(self, state: State) -> str:
        """Write a state durably, drop the oldest generation, and return a digest over all of the file.

        Args:
            state: What to keep.

        Raises:
            PayloadError: `NONFINITE`; such a state could not be loaded again.
            ResourceError: `DISK_FULL`.
        """
        check_finite(state.tensors, sender=self.owner)
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = list(parts_of({f"tensors/{name}": tensor for name, tensor in state.tensors.items()}))
        size = sum(map(len, parts))

        def head(digest: str) -> bytes:
            return pack(Frame(self._envelope(state.round), Saved.__name__, {"fields": state.fields}, digest, size)).head

        # A digest takes as long as the writing, so the two go on at the same time.
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
            digest = pool.submit(write_parts, parts, lambda part: None)
            write_atomic_parts(
                self._path(state.round),
                parts,
                head_bytes=_START + len(head(_NO_DIGEST)),
                head=lambda: _started(head(digest.result()[0])),
            )
        for old in self.present()[self.keep :]:
            self._path(old).unlink(missing_ok=True)
        # The head names the digest of the tensors, so its own digest is one over all of the file.
        return hashlib.sha256(head(digest.result()[0])).hexdigest()

    def present(self) -> list[int]:
        """Return the rounds that have a file, damaged or not, newest first."""
        stems = (path.stem.removeprefix("round-") for path in self.folder.glob("round-*.ckpt"))
        return sorted((int(stem) for stem in stems if stem.isdigit()), reverse=True)

    def valid(self) -> list[int]:
        """Return the rounds whose file is whole and of this run, newest first."""
        return [number for number in self.present() if self._whole(number) is not None]

    def load(self, number: int) -> State:
        """Return the state of a round.

        Args:
            number: The round.

        Raises:
            StateLost: `STATE_CORRUPT`, the file is damaged, missing or of another run.
        """
        whole = self._whole(number)
        if whole is None:
            raise StateLost("STATE_CORRUPT", f"the checkpoint of round {number} is damaged", where=str(self.folder))
        saved = decode(whole[0], {"Saved": Saved})
        assert isinstance(saved, Saved)  # noqa: S101
        return State(number, dict(saved.tensors), saved.fields)

    def digest(self, number: int) -> str:
        """Return the digest that `save` returned for a round, or an empty string if its file is not whole.

        Args:
            number: The round.
        """
        whole = self._whole(number)
        return whole[1] if whole else ""

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

    def _whole(self, number: int) -> tuple[Frame, str] | None:
        """Return a checkpoint taken apart and the digest over all of it, or None if it is not whole or not ours."""
        path = self._path(number)
        try:
            with path.open("rb") as handle:
                start, head = handle.read(_START), read_head(handle)
                digest = hashlib.sha256(head)
                if start != _MAGIC + digest.digest():
                    return None
                frame = unpack(Parcel(head), max_bytes=path.stat().st_size)
                found = hashlib.file_digest(handle, "sha256").hexdigest() if frame.blob_size else ""
                size = _START + len(head) + frame.blob_size
        except (OSError, PayloadError):
            return None
        if frame.envelope != self._envelope(number) or found != frame.blob_digest or path.stat().st_size != size:
            return None
        blob = FileBlob(path, found, frame.blob_size, start=_START + len(head)) if frame.blob_size else None
        return replace(frame, blob=blob), digest.hexdigest()
