"""A party's side of secure sums: it takes part in one at a time, and lets nothing be opened twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.errors import PayloadError, StateLost
from fedllm.privacy.secure_sum import Member, Signatures
from fedllm.runs.jsonl import write_json
from fedllm.runtime.sum_layout import Layout
from fedllm.runtime.sum_messages import (
    AgreeSum,
    KeysShown,
    Masked,
    OpenSum,
    SealShares,
    SharesSealed,
    SharesTaken,
    ShowKeys,
    SumAgreed,
    SumOpened,
    TakeShares,
    context_of,
    known,
    shown,
)
from fedllm.scenarios.base import Summand
from fedllm.wire.frame import Frame
from fedllm.wire.payload import Payload, manifest_of


@dataclass
class SumTerms:
    """What a job says about its secure sums, the same at all who take part.

    Args:
        parties: The parties of the job.
        least: Number of parties that begin a sum -> how many must stay.
        layout: In which integers is summed.
    """

    parties: tuple[str, ...]
    least: Callable[[int], int]
    layout: Layout


@dataclass
class PartySums:
    """One party's part in a run's secure sums. Keys and masks are in memory only: a restart forgets them.

    Args:
        party: The party.
        job_digest: The job.
        run_id: The run.
        terms: The job's.
        signatures: How the party signs, and verifies the others.
        book: A file that keeps what was opened, so that no sum is opened again for others.
    """

    party: str
    job_digest: str
    run_id: str
    terms: SumTerms
    signatures: Signatures = field(repr=False)
    book: Path
    _member: Member | None = None
    _context: bytes = b""
    _asked: str = ""
    _agreed: str = ""

    def answer(self, request: Payload, round_: int) -> Payload:
        """Return the answer to one step of a sum.

        Args:
            request: One of `SUM_REQUESTS`.
            round_: The round.

        Raises:
            PayloadError: `SUM_REFUSED` or `COHORT_CHANGED`.
        """
        if isinstance(request, ShowKeys):
            return self._begin(request, round_)
        member = self._of(getattr(request, "what", ""), round_)
        match request:
            case SealShares():
                return SharesSealed(sealed=member.seal(known(request.keys)))
            case TakeShares():
                member.take(request.sealed)
                return SharesTaken()
            case AgreeSum():
                self._check_book(request, round_)
                self._agreed = _agreement_digest(self._asked, request.survivors)
                return SumAgreed(signature=member.agree(request.survivors, self._asked).hex())
            case OpenSum():
                signed = {name: bytes.fromhex(text) for name, text in request.signatures.items()}
                opening = member.open(signed)
                self._member = None
                # Before the shares leave. Without them nothing is opened, and nothing need be remembered.
                self._note(request.what, round_)
                return SumOpened(seeds=opening.seeds, keys=opening.keys)
        raise PayloadError("PAYLOAD_REFUSED", f"{type(request).__name__} is no step of a sum", where=self.party)

    def _begin(self, request: ShowKeys, round_: int) -> KeysShown:
        self._context = context_of(self.job_digest, self.run_id, round_, request.what)
        terms = self.terms
        self._member = Member(self.party, self._context, terms.parties, terms.least, self.signatures)
        return KeysShown(keys=shown(self._member.keys()))

    def _of(self, what: str, round_: int) -> Member:
        if self._member is None or self._context != context_of(self.job_digest, self.run_id, round_, what):
            raise PayloadError(
                "SUM_REFUSED",
                f"no sum of `{what}` in round {round_} is under way here",
                where=self.party,
                fix="a party that was started again takes part in the next sum",
            )
        return self._member

    def check_ready(self, what: str, frame: Frame) -> None:
        """Return if an answer can be masked, before it is worked out.

        Args:
            what: What is summed.
            frame: The request.

        Raises:
            PayloadError: `SUM_IN_CLEAR`.
        """
        number = frame.envelope.round
        context = context_of(self.job_digest, self.run_id, number, what)
        if self._member is None or self._context != context or not self._member.is_ready:
            raise PayloadError(
                "SUM_IN_CLEAR",
                f"the answer to {frame.kind} would leave unmasked, and the job sums it securely",
                where=f"party {self.party}, round {number}",
                fix="nothing left; the server has to begin a secure sum first",
            )
        self._asked = digest_of(frame)

    def masked(self, answer: Payload) -> Masked:
        """Return an answer, masked.

        Args:
            answer: A summand.

        Raises:
            PayloadError: `SUM_OVERFLOW`, `NONFINITE`, or `SUM_IN_CLEAR` for what is no summand.
        """
        if not isinstance(answer, Summand) or self._member is None:
            raise PayloadError("SUM_IN_CLEAR", f"{type(answer).__name__} cannot be masked", where=self.party)
        manifest = manifest_of(answer.tensors)
        words = self.terms.layout.words(answer, manifest, party=self.party)
        self._member.mask(words)
        return self.terms.layout.masked(words, manifest, tuple(answer.counts))

    def _check_book(self, request: AgreeSum, round_: int) -> None:
        """Raise where this sum was opened before for other parties, or of something else.

        What a party sends follows from what it is asked. If the server could have a sum opened for these parties, and
        again for all but one, it would know that one's part.
        """
        agreed = _agreement_digest(self._asked, request.survivors)
        if self._read().get(f"{round_}/{request.what}", agreed) != agreed:
            raise PayloadError(
                "COHORT_CHANGED",
                f"the sum of `{request.what}` of round {round_} was opened for other parties, or of another request",
                where=self.party,
                fix="have the same parties take part; if one is gone for good, start a new run",
            )

    def _note(self, what: str, round_: int) -> None:
        write_json(self.book, self._read() | {f"{round_}/{what}": self._agreed})

    def _read(self) -> dict[str, str]:
        if not self.book.exists():
            return {}
        try:
            return {str(key): str(value) for key, value in json.loads(self.book.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError):
            raise StateLost(
                "STATE_CORRUPT",
                "the file that keeps sums from being opened twice cannot be read",
                where=str(self.book),
                fix="restore it from a backup, or start a new run",
            ) from None


def _agreement_digest(asked: str, survivors: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([asked, sorted(survivors)]).encode()).hexdigest()


def digest_of(frame: Frame) -> str:
    """Return the SHA-256 of what was asked, tensors included, whoever it was addressed to.

    Args:
        frame: The request.
    """
    text = json.dumps([frame.kind, frame.fields, frame.blob_digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
