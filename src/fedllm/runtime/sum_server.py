"""The server's side of secure sums: six exchanges with the parties, of which the fourth is the request itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fedllm.errors import PayloadError, RunPaused
from fedllm.privacy.secure_sum import Combiner, Opening
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
    shown,
)
from fedllm.runtime.sum_party import SumTerms
from fedllm.scenarios.base import Decode, Manifests, Total, manifest_for
from fedllm.wire.payload import Failure, Payload

# (request for all, or one for each; round; parties) -> their answers as they come.
Asked = Callable[[Payload | Mapping[str, Payload], int, Sequence[str]], Iterator[tuple[str, Payload]]]
_Answer = TypeVar("_Answer", bound=Payload)


@dataclass(frozen=True)
class Answers:
    """What each answer holds before it is masked, and what makes of it what is summed; that must be linear."""

    manifest: Manifests
    decode: Decode


@dataclass
class SecureTotal:
    """One secure sum.

    Args:
        asked: Carries messages.
        terms: The job's.
        job_digest: The job.
        run_id: The run.
        round_: The round.
    """

    asked: Asked
    terms: SumTerms
    job_digest: str
    run_id: str
    round_: int
    failures: dict[str, str] = field(default_factory=dict)

    def of(self, request: Payload, to: Sequence[str], answers: Answers) -> Total:
        """Return the sum of the parties' answers to a request.

        Args:
            request: What is asked; its answers are private.
            to: Who is asked.
            answers: What they are like.

        Raises:
            RunPaused: `SUM_ABORTED`: too few parties stayed; nothing was opened.
        """
        try:
            return self._summed(request, to, answers)
        except RunPaused as error:
            failed = ", ".join(f"{party}: {code}" for party, code in sorted(self.failures.items()))
            what = f"{error.what} ({failed})" if failed else error.what
            raise RunPaused(error.code, what, where=f"round {self.round_}", fix=error.fix) from None

    def _summed(self, request: Payload, to: Sequence[str], answers: Answers) -> Total:
        what = self.terms.private(request)
        sum_ = Combiner(context_of(self.job_digest, self.run_id, self.round_, what), self.terms.least)
        taken = self._begin(sum_, what, to)
        names = self._gather(sum_, request, taken, answers)
        sum_.need(sum_.survivors, "sent their masked answers")
        opened = sum_.opened(self._openings(sum_, what))
        spec = manifest_for(to[0], answers.manifest)
        sums, weight, counts = self.terms.layout.read(opened, spec, names)
        means = {name: (tensor / weight).float() for name, tensor in answers.decode(to[0], sums).items()}
        inside = tuple(party for party in to if party in sum_.survivors)
        return Total(inside, means, weight, counts, self.failures)

    def _begin(self, sum_: Combiner, what: str, to: Sequence[str]) -> list[str]:
        """Return the parties that have keys and the others' shares, and can mask their answers now."""
        for party, keys in self._each(ShowKeys(what=what), to, KeysShown):
            if (found := keys.keys.keys()).can_agree:
                sum_.keys[party] = found
            else:
                self.failures[party] = "SUM_REFUSED"
        sum_.need(list(sum_.keys), f"of {len(to)} began")
        request = SealShares(what=what, keys={name: shown(keys) for name, keys in sum_.keys.items()})
        for party, shares in self._each(request, self._in_order(to, sum_.keys), SharesSealed):
            sum_.sealed[party] = dict(shares.sealed)
        sum_.need(list(sum_.sealed), "shared their secrets")
        ready = self._in_order(to, sum_.sealed)
        shares_for = {party: TakeShares(what=what, sealed=sum_.addressed_to(party)) for party in ready}
        taken = [party for party, _ in self._each(shares_for, ready, SharesTaken)]
        sum_.need(taken, "took the others' shares")
        return self._in_order(to, taken)

    def _gather(self, sum_: Combiner, request: Payload, to: Sequence[str], answers: Answers) -> Sequence[str]:
        """Ask for the summands themselves, and return the names of their counts."""
        names: Sequence[str] | None = None
        for party, answer in self._each(request, to, Masked):
            try:
                words = self.terms.layout.taken(answer, manifest_for(party, answers.manifest), party=party)
                if answer.names != (names or answer.names):
                    raise PayloadError("PAYLOAD_REFUSED", "other counts than those of the other parties", where=party)
                sum_.add(party, words)
                names = answer.names
            except PayloadError as error:
                self.failures[party] = error.code
        return names or ()

    def _openings(self, sum_: Combiner, what: str) -> dict[str, Opening]:
        survivors = self._in_order(self.terms.parties, sum_.survivors)
        agree = AgreeSum(what=what, survivors=survivors)
        signatures = {party: answer.signature for party, answer in self._each(agree, survivors, SumAgreed)}
        sum_.need(list(signatures), "agreed on who is in the sum")
        request = OpenSum(what=what, signatures=signatures)
        return {
            party: Opening(dict(answer.seeds), dict(answer.keys))
            for party, answer in self._each(request, self._in_order(survivors, signatures), SumOpened)
        }

    def _in_order(self, order: Sequence[str], names: Mapping[str, object] | Sequence[str]) -> list[str]:
        return [name for name in order if name in names]

    def _each(
        self, request: Payload | Mapping[str, Payload], to: Sequence[str], expected: type[_Answer]
    ) -> Iterator[tuple[str, _Answer]]:
        """Yield the parties' answers of the expected kind; who answers otherwise is noted as failed."""
        for party, payload in self.asked(request, self.round_, to):
            if isinstance(payload, expected):
                yield party, payload
            else:
                self.failures[party] = payload.code if isinstance(payload, Failure) else "PAYLOAD_REFUSED"
