"""A party's side of a link: decode, check lineage, let the client half answer, save its state, encode."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedllm.errors import FedllmError, PayloadError
from fedllm.runs.checkpoint import Generations
from fedllm.runs.metrics import RowFile
from fedllm.runtime.base import (
    SERVER,
    Copy,
    Done,
    Hello,
    Ready,
    Restore,
    Seal,
    ShowCommitment,
    SignHead,
    Witness,
    max_message_bytes,
)
from fedllm.runtime.freshness import Freshness
from fedllm.runtime.kinds import AROUND
from fedllm.runtime.package_messages import PACKAGE_REQUESTS
from fedllm.runtime.signatory import Signatory
from fedllm.runtime.sum_messages import SUM_REQUESTS
from fedllm.runtime.sum_party import PartySums
from fedllm.scenarios.base import ClientHalf, Log, Row
from fedllm.wire.blob import Blob, in_memory
from fedllm.wire.codecs import Codec
from fedllm.wire.frame import Frame, Keep, Parcel, check_finite, decode, encode, pack, unpack, with_blob
from fedllm.wire.patch import applied
from fedllm.wire.payload import Envelope, Failure, Payload, Tensors

_log = logging.getLogger("fedllm.party")
# A message's size is compared with the adapter's once it is known whose it is.
_ANY_BYTES = 2**48


@dataclass
class Blobs:
    """The last tensors received in a process, by digest; shared by all its parties, since they hold the same."""

    held: dict[str, Blob]

    def keep(self, frame: Frame) -> None:
        """Keep a message's tensors and forget the ones before."""
        if frame.blob and frame.blob_digest not in self.held:
            self.forget()
            self.held[frame.blob_digest] = frame.blob

    def forget(self) -> None:
        """Keep nothing."""
        for blob in self.held.values():
            blob.discard()
        self.held.clear()


class PackageDesk(Protocol):
    """A party's part when a package goes over the wire: see `fedllm.runtime.package_party`."""

    def answer(self, request: Payload) -> Payload:
        """Return the answer to one request."""
        ...

    def close(self) -> None:
        """Let go of what is under way."""
        ...


class Guards(Protocol):
    """Stands before a party: `fedllm.runtime.guard.Guard`. Where it raises, nothing is done and nothing leaves."""

    def asked(self, frame: Frame, parcel: Parcel) -> None:
        """Return if the request may be answered."""
        ...

    def answered(self, frame: Frame, parcel: Parcel) -> None:
        """Return if the answer may leave."""
        ...

    def refused(self, code: str, *, round_: int | None = None) -> None:
        """Note that something was refused."""
        ...

    def witness(self, witness: Witness, *, round_: int) -> Witness:
        """Note the others' heads, and return one's own."""
        ...


@dataclass
class PartyHost:
    """One party of a run. `open_client` makes a fresh client half; nothing of it survives a restart but its state.

    Tensors of a request may be `room` bytes longer than those that were agreed at the start allow.
    Between machines messages are signed as `seal` says, `fetch` pulls a request's tensors, and `keep` puts an answer's
    where they can be pulled. `codec_down` is that of changes to the tensors that were received before.
    With `sums`, what is private leaves masked, or not at all. `signatory` signs the log of commitments of a model that
    is claimed, `take_copy` writes the party's own copy of the adapter, and `package` gives or takes the base model.
    """

    party: str
    job_digest: str
    kinds: Mapping[str, type[Payload]]
    open_client: Callable[[Log], ClientHalf]
    ready: Callable[[list[int]], Ready]
    states: Generations
    rows: RowFile
    blobs: Blobs
    guard: Guards | None = None
    seal: Seal | None = None
    fresh: Freshness = field(default_factory=Freshness)
    keep: Keep = in_memory
    fetch: Callable[[Frame], Blob] | None = None
    room: int = 0
    codec_down: Codec | None = None
    sums: PartySums | None = None
    signatory: Signatory | None = None
    take_copy: Callable[[Tensors], None] | None = None
    package: PackageDesk | None = None
    client: ClientHalf | None = None
    _rows: list[Row] = field(default_factory=list)
    _last: int = 0

    def handle(self, parcel: Parcel, *, timeout_s: float) -> Parcel:
        """Return the answer to one message. Whatever goes wrong leaves as a code; its text stays in the party's log.

        Args:
            parcel: The message.
            timeout_s: Time to answer, in seconds.

        Raises:
            PayloadError: It is no message that could be answered.
        """
        frame = unpack(parcel, max_bytes=_ANY_BYTES)
        try:
            self._check_lineage(frame.envelope)
            if self.seal:
                self.seal.verify(SERVER, frame.text, frame.signature)
            self.fresh.take(frame.envelope.sequence, party=self.party)
            if self.guard:
                self.guard.asked(frame, parcel)
            frame = self._whole(frame)
            self.blobs.keep(frame)
            deadline = time.monotonic() + timeout_s
            payload = self._answer(decode(frame, dict(self.kinds) | AROUND), frame, deadline)
        except FedllmError as error:
            self._note_refusal(error, frame.envelope.round)
            payload = Failure(code=error.code)
        except Exception:  # noqa: BLE001  (the party's boundary: no exception text crosses it)
            _log.exception("party %s failed", self.party)
            payload = Failure(code="PARTY_FAILED")
        return self._answered(payload, frame.envelope.reply())

    def _note_refusal(self, error: FedllmError, number: int) -> None:
        _log.error("party %s: %s", self.party, error)
        if self.guard:
            # Where it cannot be noted, the answer is a refusal all the same.
            with suppress(FedllmError):
                self.guard.refused(error.code, round_=number)

    def _whole(self, frame: Frame) -> Frame:
        size = max(frame.blob_size, frame.patch_size) - self.room
        if size > max_message_bytes({}) and size > max_message_bytes(self.ready([]).tensors()):
            raise PayloadError("PAYLOAD_REFUSED", f"tensors of {size + self.room} bytes", where=frame.envelope.sender)
        held = self.blobs.held
        if not frame.blob_digest or frame.blob or frame.blob_digest in held:
            return with_blob(frame, held)
        if frame.patch_of:
            return self._patched(frame, held.get(frame.patch_of))
        return replace(frame, blob=self.fetch(frame)) if self.fetch else with_blob(frame, held)

    def _patched(self, frame: Frame, old: Blob | None) -> Frame:
        if old is None or self.codec_down is None:
            raise PayloadError("BLOB_MISSING", "the tensors that the message is a change to are not held here")
        patch = frame.patch or (self.fetch(frame) if self.fetch else None)
        if patch is None:
            raise PayloadError("BLOB_MISSING", "the change that the message refers to did not come along")
        try:
            return replace(frame, blob=applied(old, patch, self.codec_down, digest=frame.blob_digest))
        finally:
            patch.discard()

    def _answered(self, payload: Payload, envelope: Envelope) -> Parcel:
        frame, answer = self._packed(payload, envelope)
        if self.guard:
            try:
                self.guard.answered(frame, answer)
            except FedllmError as error:
                self._note_refusal(error, envelope.round)
                return self._packed(Failure(code=error.code), envelope)[1]
        return answer

    def _packed(self, payload: Payload, envelope: Envelope) -> tuple[Frame, Parcel]:
        frame = encode(payload, envelope, keep=self.keep)
        return frame, pack(frame, sign=self.seal.sign if self.seal else None)

    def _check_lineage(self, envelope: Envelope) -> None:
        expected = (self.job_digest, self.states.run_id, SERVER, self.party)
        if (envelope.job_digest, envelope.run_id, envelope.sender, envelope.recipient) != expected:
            raise PayloadError("PAYLOAD_REFUSED", "the message belongs to another job, run or party", where=self.party)

    def _answer(self, request: Payload, frame: Frame, deadline: float) -> Payload:
        round_ = frame.envelope.round
        match request:
            case Hello():
                self.blobs.forget()
                return self.ready(self._restorable(request))
            case Restore():
                self._restore(request)
                return Done()
            case Witness():
                return self.guard.witness(request, round_=round_) if self.guard else Witness(heads={})
            case ShowCommitment() | SignHead() if self.signatory:
                return self.signatory.answer(request)
        if self.package and isinstance(request, PACKAGE_REQUESTS):
            return self.package.answer(request)
        if self.client is None:
            raise PayloadError("PAYLOAD_REFUSED", "a request before the handshake", where=self.party)
        if isinstance(request, Copy) and self.take_copy:
            self.take_copy(dict(request.adapter))
            return Done()
        if self.sums and isinstance(request, SUM_REQUESTS):
            return self.sums.answer(request, round_)
        what = self.sums.terms.private(request) if self.sums else ""
        if self.sums and what:
            self.sums.check_ready(what, frame)
        try:
            answer = (self._commit if request.commits else self._handle)(request, round_, deadline)
        finally:
            self._write_rows()
        return self.sums.masked(answer) if self.sums and what else answer

    def _handle(self, request: Payload, round_: int, deadline: float) -> Payload:
        assert self.client is not None  # noqa: S101
        return self.client.handle(request, round_=round_, deadline=deadline)

    def _commit(self, request: Payload, round_: int, deadline: float) -> Payload:
        started = time.perf_counter()
        try:
            answer = self._handle(request, round_, deadline)
            self.log(round_, None, {"seconds_compute": time.perf_counter() - started})
            assert self.client is not None  # noqa: S101
            # An answer that the server will refuse must not move the party's state on.
            for field in answer.tensor_fields():
                check_finite(getattr(answer, field), sender=self.party)
            self._write_rows()
            self.states.save(self.client.state())
        except Exception:
            # A half-trained state must not leak into the next round: go back to the last one saved.
            self._reopen(self._last)
            raise
        self._last = round_
        return answer

    def log(self, round_: int, split: str | None, values: Mapping[str, float | int | None]) -> None:
        """Note metrics for the party's own file; they are written before the answer leaves.

        Args:
            round_: The round.
            split: What they were measured on.
            values: Metrics by name.
        """
        head = {"round": round_, "party": self.party, "split": split}
        self._rows += [head | {"name": name, "value": value} for name, value in values.items()]

    def _write_rows(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self.rows.append(rows)

    def _restorable(self, hello: Hello) -> list[int]:
        valid = {0, *self.states.valid()}
        trained = hello.trained.get(self.party, [])
        return [number for number, last in zip(hello.rounds, trained, strict=True) if last in valid]

    def _restore(self, request: Restore) -> None:
        last = request.trained[self.party]
        self._reopen(last)
        self.states.forget_after(last)
        self.rows.rewind(request.committed_round)

    def _reopen(self, last_trained: int) -> None:
        state = self.states.load(last_trained) if last_trained else None
        self.client = self.open_client(self.log)
        if state is not None:
            self.client.restore(state)
        self._last = last_trained
