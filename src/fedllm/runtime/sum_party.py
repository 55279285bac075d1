"""A party's side of secure sums: it takes part in one at a time, and lets nothing be opened twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from fedllm.errors import PayloadError
from fedllm.privacy.secure_sum import Member, Signatures
from fedllm.runtime.sum_book import Opened, SumBook
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
        num_rounds: The last round.
        private: Request -> the name of what its answers add up to, where none may be seen by itself; else empty.
    """

    parties: tuple[str, ...]
    least: Callable[[int], int]
    layout: Layout
    num_rounds: int
    private: Callable[[Payload], str]


@dataclass
class PartySums:
    """One party's part in a run's secure sums. Keys and masks are in memory only: a restart forgets them.

    Args:
        party: The party.
        job_digest: The job.
        run_id: The run.
        terms: The job's.
        signatures: How the party signs, and verifies the others.
        book: Keeps what was opened in all runs, so that no sum is opened again for others.
    """

    party: str
    job_digest: str
    run_id: str
    terms: SumTerms
    signatures: Signatures = field(repr=False)
    book: SumBook
    _member: Member | None = None
    _context: bytes = b""
    _asked: tuple[str, str] = ("", "")
    _agreed: Opened | None = None

    def answer(self, request: Payload, round_: int) -> Payload:
        """Return the answer to one step of a sum.

        Args:
            request: One of `SUM_REQUESTS`.
            round_: The round.

        Raises:
            PayloadError: `SUM_REFUSED` or `COHORT_CHANGED`.
            StateLost: `STATE_CORRUPT`.
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
                return self._agree(member, request, round_)
            case OpenSum():
                return self._open(member, request)
        raise PayloadError("PAYLOAD_REFUSED", f"{type(request).__name__} is no step of a sum", where=self.party)

    def _agree(self, member: Member, request: AgreeSum, round_: int) -> SumAgreed:
        inside = tuple(sorted(request.survivors))
        agreed = Opened(self.run_id, round_, request.what, *self._asked, inside)
        self.book.check(self.job_digest, agreed)
        signature = member.agree(request.survivors, agreed.asked)
        # Not before: a second list, which is refused, must not be noted in place of the one that is opened.
        self._agreed = agreed
        return SumAgreed(signature=signature.hex())

    def _open(self, member: Member, request: OpenSum) -> SumOpened:
        opening = member.open({name: bytes.fromhex(text) for name, text in request.signatures.items()})
        self._member = None
        assert self._agreed is not None  # noqa: S101
        # Before the shares leave. Without them nothing is opened, and nothing need be remembered.
        self.book.note(self.job_digest, self._agreed)
        return SumOpened(seeds=opening.seeds, keys=opening.keys)

    def _begin(self, request: ShowKeys, round_: int) -> KeysShown:
        if round_ > self.terms.num_rounds:
            raise PayloadError(
                "SUM_REFUSED",
                f"a sum of `{request.what}` in round {round_}, and the job has {self.terms.num_rounds}",
                where=self.party,
                fix="nothing left; the server asks for more than the job says",
            )
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
        self._asked = digest_of(frame), frame.blob_digest

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


def digest_of(frame: Frame) -> str:
    """Return the SHA-256 of what was asked, tensors included, whoever it was addressed to.

    Args:
        frame: The request.
    """
    text = json.dumps([frame.kind, frame.fields, frame.blob_digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
