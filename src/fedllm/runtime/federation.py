"""`ask` and `total` over any link: encoding, lineage checks, the byte ledger, and the exact sum."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedllm.aggregate.total import GridSum
from fedllm.errors import CODES, FedllmError, PayloadError, RunFailed, RunPaused
from fedllm.runtime.base import SERVER, Link, Timings, max_message_bytes
from fedllm.runtime.freshness import EPOCH_BITS
from fedllm.runtime.kinds import AROUND
from fedllm.runtime.sum_party import SumTerms
from fedllm.runtime.sum_server import Answers, SecureTotal
from fedllm.scenarios.base import Decode, Manifests, Reply, Summand, Total, as_it_is, manifest_for
from fedllm.wire.frame import Frame, Parcel, check_manifest, decode, encode, pack, unpack
from fedllm.wire.ledger import ByteLedger
from fedllm.wire.payload import Envelope, Failure, Manifest, Payload

Notify = Callable[[str, str, int], None]

# What a party may refuse for that is no fault of the job.
_CURABLE = {"NOT_APPROVED", "DISK_FULL", "ROUND_TIMEOUT", "RUN_EXISTS", "DATA_NOT_FOUND", "MODEL_NOT_FOUND"}


class LinkedFederation:
    """The server's view of the parties. See `fedllm.scenarios.base.Federation`.

    Tensors that a party holds already are sent as a digest: a party that has just evaluated the global adapter is
    not sent it again to train on. A party that holds what a change was made for is sent the change.
    """

    def __init__(
        self,
        link: Link,
        *,
        kinds: Mapping[str, type[Payload]],
        job_digest: str,
        run_id: str,
        timeout_s: float,
        notify: Notify = lambda event, party, round_: None,
    ) -> None:
        self._link, self._seal, self._kinds = link, link.seal, dict(kinds) | AROUND
        self._job_digest, self._run_id, self._timeout_s = job_digest, run_id, timeout_s
        self._notify = notify
        # With these terms, what is private to a party is summed securely.
        self.sums: SumTerms | None = None
        self._sequence = 0
        self._max_bytes = max_message_bytes({})
        self._held_by: dict[str, str] = {}
        # By how much the last message to a party was shorter than its tensors.
        self._shorter: dict[str, int] = {}
        self.trained: dict[str, int] = dict.fromkeys(link.parties, 0)
        self.ledger = ByteLedger()
        self.timings = Timings()

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties of the run, in the job's order."""
        return self._link.parties

    def ask(self, request: Payload | Mapping[str, Payload], *, round_: int, to: Sequence[str]) -> Iterator[Reply]:
        """Yield each party's answer as it arrives, to one request or to its own; what cannot be used is a `Failure`."""
        for party, payload in self._asked(request, round_, to):
            # The caller may keep the answer, whose tensors are gone here when the next one is looked at.
            tensors = {field: dict(getattr(payload, field)) for field in payload.tensor_fields()}
            yield Reply(party, payload.model_copy(update=tensors) if tensors else payload)

    def total(
        self, request: Payload, *, round_: int, to: Sequence[str], manifest: Manifests, decode: Decode = as_it_is
    ) -> Total:
        """Return the weighted sum of the answers and who is in it, nothing else.

        One answer's tensors are read at a time, one by one, wherever they lie. Where the job says so, what is private
        to a party arrives masked.
        """
        if self.sums and self.sums.private(request):
            sum_ = SecureTotal(self._asked, self.sums, self._job_digest, self._run_id, round_)
            return self._securely(sum_, request, to, Answers(manifest, decode))
        grid, inside, failures = GridSum(), [], dict[str, str]()
        for party, payload in self._asked(request, round_, to):
            started = time.perf_counter()
            try:
                _fold(grid, party, payload, manifest_for(party, manifest), decode)
                inside.append(party)
            except PayloadError as error:
                failures[party] = error.code
            self.timings.aggregate += time.perf_counter() - started
        order = [party for party in to if party in inside]
        return Total(tuple(order), grid.means(), grid.weight, grid.counts(), failures)

    def _securely(self, sum_: SecureTotal, request: Payload, to: Sequence[str], answers: Answers) -> Total:
        started, waited = time.perf_counter(), self.timings.wait
        try:
            return sum_.of(request, to, answers)
        finally:
            self.timings.aggregate += time.perf_counter() - started - (self.timings.wait - waited)

    def _asked(
        self, request: Payload | Mapping[str, Payload], round_: int, to: Sequence[str]
    ) -> Iterator[tuple[str, Payload]]:
        each = dict.fromkeys(to, request) if isinstance(request, Payload) else request
        # What is asked of several is encoded once, however many there are.
        different = {id(payload): payload for payload in each.values()}
        drafts = {
            key: encode(payload, self._envelope(round_, SERVER), keep=self._link.keep)
            for key, payload in different.items()
        }
        unsent = list(to)
        try:
            # A second pass serves the parties that no longer hold the tensors they were sent by digest.
            while unsent:
                retry: list[str] = []
                frames = {
                    party: replace(drafts[id(each[party])], envelope=self._envelope(round_, party)) for party in unsent
                }
                self._sequence += 1
                for party, answer in self._exchange(frames, round_):
                    payload = self._decoded(answer, frames[party].envelope)
                    if isinstance(payload, Failure) and payload.code == "BLOB_MISSING" and party in self._held_by:
                        del self._held_by[party]
                        retry.append(party)
                        continue
                    self._remember(party, frames[party], each[party], payload)
                    try:
                        yield party, payload
                    finally:
                        if answer and answer.blob:
                            answer.blob.discard()
                unsent = retry
        finally:
            for blob in (blob for draft in drafts.values() for blob in (draft.blob, draft.patch)):
                if blob:
                    blob.discard()

    def _envelope(self, round_: int, party: str) -> Envelope:
        return Envelope(
            job_digest=self._job_digest,
            run_id=self._run_id,
            round=round_,
            sequence=self._sequence,
            sender=SERVER,
            recipient=party,
        )

    def _packed(self, frame: Frame) -> Parcel:
        party = frame.envelope.recipient
        held = self._held_by.get(party) if frame.blob else None
        # What is no shorter than the tensors is not worth it.
        if held is None or held != frame.patch_of or frame.patch_size >= frame.blob_size:
            frame = frame.without_patch()
        self._shorter[party] = frame.blob_size - frame.patch_size if frame.patch_of else 0
        omit = held is not None and held == frame.blob_digest
        return pack(frame, omit_blob=omit, sign=self._seal.sign if self._seal else None)

    def _exchange(self, frames: Mapping[str, Frame], round_: int) -> Iterator[tuple[str, Parcel | None]]:
        messages = {party: self._packed(frame) for party, frame in frames.items()}
        for party, parcel in messages.items():
            self.ledger.add(round_=round_, party=party, direction="down", num_bytes=parcel.num_bytes)
            self._notify("asked", party, round_)
        started = time.perf_counter()

        def wanted(party: str, parcel: Parcel) -> Frame | None:
            return self._wanted(parcel, frames[party].envelope)

        for party, answer in self._link.exchange(messages, timeout_s=self._timeout_s, wanted=wanted):
            self.timings.wait += time.perf_counter() - started
            if answer is not None:
                self.ledger.add(round_=round_, party=party, direction="up", num_bytes=answer.num_bytes)
            self._notify("answered", party, round_)
            yield party, answer
            started = time.perf_counter()

    def _remember(self, party: str, frame: Frame, request: Payload, payload: Payload) -> None:
        if isinstance(payload, Failure):
            return
        if frame.blob:
            self._held_by[party] = frame.blob_digest
            if saved := self._shorter.get(party):
                self.ledger.save(round_=frame.envelope.round, party=party, num_bytes=saved)
        if request.commits:
            self.trained[party] = frame.envelope.round

    def _wanted(self, parcel: Parcel, sent: Envelope) -> Frame | None:
        try:
            frame = self._opened(parcel, sent)
        except PayloadError:
            # It is refused again, and noted, when it is decoded.
            return None
        return frame if frame.blob_digest and not frame.blob else None

    def _opened(self, parcel: Parcel, sent: Envelope) -> Frame:
        frame = unpack(parcel, max_bytes=self._max_bytes)
        if self._seal:
            self._seal.verify(sent.recipient, frame.text, frame.signature)
        if frame.patch_of:
            raise PayloadError("PAYLOAD_REFUSED", "an answer is no change to another one", where=sent.recipient)
        if frame.envelope != sent.reply():
            raise PayloadError("PAYLOAD_REFUSED", "the answer belongs to another request", where=sent.recipient)
        return frame

    def _decoded(self, answer: Parcel | None, sent: Envelope) -> Payload:
        if answer is None:
            return Failure(code="ROUND_TIMEOUT")
        try:
            payload = decode(self._opened(answer, sent), self._kinds)
        except PayloadError as error:
            return Failure(code=error.code)
        # A code that this version does not know says no more than that the party failed.
        unknown = isinstance(payload, Failure) and payload.code not in CODES
        return Failure(code="PARTY_FAILED") if unknown else payload

    def start_at(self, epoch: int) -> None:
        """Number messages from here on above all of the run's earlier starts.

        Args:
            epoch: The number of this start.
        """
        self._sequence = epoch << EPOCH_BITS

    def expect(self, manifest: Manifest) -> None:
        """Set the largest answer that is accepted, from the tensors agreed at the handshake.

        Args:
            manifest: The adapter's names, dtypes and shapes.
        """
        self._max_bytes = max_message_bytes(manifest)


def _fold(grid: GridSum, party: str, payload: Payload, manifest: Manifest, decode: Decode) -> None:
    if isinstance(payload, Failure):
        raise PayloadError(payload.code, "the party failed", where=party)
    if not isinstance(payload, Summand):
        raise PayloadError("PAYLOAD_REFUSED", "the answer is not a summand", where=party)
    check_manifest(payload.tensors, manifest, sender=party)
    grid.add(decode(party, payload.tensors), weight=payload.weight, counts=payload.counts, sender=party)


def parties_error(refused: dict[str, str]) -> FedllmError:
    """Return one error for all parties that cannot take part.

    Args:
        refused: Party -> code.
    """
    # What no person at the site can cure comes first; the run waits for the rest.
    order = sorted(refused, key=lambda party: (refused[party] in _CURABLE, refused[party], party))
    code = refused[order[0]]
    same = [party for party in order if refused[party] == code]
    others = "".join(f"; {party}: {refused[party]}" for party in order if party not in same)
    what = f"{'the party' if len(same) == 1 else 'these parties'} cannot take part{others}"
    error = RunPaused if code in _CURABLE else RunFailed
    fix = "see the party's own log; then `fedllm resume RUN`"
    return error(code, what, where=f"party {', '.join(same)}", fix=fix)
