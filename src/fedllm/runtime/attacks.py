"""The attacks of an audit on what a run delivers: counts and rates come out, never an example."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedllm.data.tokens import TokenisedExample
from fedllm.evaluate.loss import example_losses
from fedllm.job.job import LocatedParty
from fedllm.privacy.auditing import SIGNIFICANCE, LowerBound, group_claim, largest_bound, one_run_audit
from fedllm.privacy.canaries import CanarySet
from fedllm.privacy.membership import area_under_curve, excess_losses, exposure, membership
from fedllm.runtime.site import Site, party_tokens
from fedllm.seeds import stream
from fedllm.wire.payload import Tensors

# Members and non-members that are looked at.
_MOST_EXAMPLES = 1000
# Where no delta is claimed.
_DELTA = 1e-5


@dataclass(frozen=True)
class Claim:
    """What a job promises of each unit: an example, a person's examples (group), or a party."""

    epsilon: float
    delta: float
    unit: str

    def for_copies(self, copies: int) -> tuple[float, float]:
        """Return (epsilon, delta) for a canary that is planted several times; only examples are hidden one by one."""
        return group_claim(self.epsilon, self.delta, copies if self.unit == "example" else 1)


@dataclass(frozen=True)
class Attack:
    """The attacks on what a run delivers: (name, party, tensors), with no party where one adapter is for all."""

    site: Site
    models: Sequence[tuple[str, str | None, Tensors]]

    def membership(self, located: LocatedParty) -> dict[str, Any] | None:
        """Return how well training examples are told from held-out ones; None where one of the two is not there."""
        party = located.party.name
        data = party_tokens(self.site, located)
        members, others = (self._some(party, split) for split in (data.train, data.held_out))
        if not members or not others or not self._is_here(party):
            return None
        plain, against = zip(*(self._losses(party, examples) for examples in (members, others)), strict=True)
        found = membership(against[0] - plain[0], against[1] - plain[1])
        by_loss = area_under_curve(-plain[0], -plain[1])
        return {"party": party, **asdict(found), "auc_by_loss_alone": by_loss}

    def canaries(self, sets: Mapping[str, CanarySet], copies: int, claim: Claim | None) -> dict[str, Any]:
        """Return the lower bound of epsilon over all parties' canaries, and how exposed the planted ones are."""
        tried = [self._tried(party, found) for party, found in sets.items() if self._is_here(party)]
        scores, included = (np.concatenate([getattr(each, name) for each in tried]) for name in ("scores", "included"))
        epsilon, delta = claim.for_copies(copies) if claim else (None, _DELTA)
        values = _bound_values(one_run_audit(scores, included, delta=delta))
        planted = {"canaries": len(included), "planted": int(included.sum()), "copies": copies}
        return planted | {"claimed_epsilon": epsilon} | values | _exposure_values(tried)

    def _tried(self, party: str, found: CanarySet) -> _Tried:
        tuned, base = self._losses(party, [*found.canaries, *found.decoys])
        change, others = np.split(excess_losses(tuned, base, number=len(found.decoys)), [len(found.canaries)])
        # Those that the coin left out are as good as decoys.
        reference = np.concatenate([others, change[~found.included]])
        return _Tried(-change, found.included, exposure(change[found.included], reference), len(reference) + 1)

    def _is_here(self, party: str) -> bool:
        return any(owner in (None, party) for _, owner, _ in self.models)

    def _some(self, party: str, examples: Sequence[TokenisedExample]) -> list[TokenisedExample]:
        """Return all examples, or so many of them drawn by name."""
        if len(examples) <= _MOST_EXAMPLES:
            return list(examples)
        chosen = stream(self.site.job.seed, "audited", party).permutation(len(examples))[:_MOST_EXAMPLES]
        return [examples[i] for i in sorted(chosen)]

    def _losses(self, party: str, examples: Sequence[TokenisedExample]) -> tuple[np.ndarray, np.ndarray]:
        """Return each example's loss under the party's tuned model, and under the bare base model, in nats."""
        tensors = next(tensors for _, owner, tensors in self.models if owner in (None, party))
        site = self.site
        pad_id, size = site.base.tokenizer.pad_token_id, site.job.evaluate.per_device_eval_batch_size
        site.model.write(tensors)
        tuned = example_losses(site.model.model, examples, pad_id=pad_id, batch_size=size)
        with site.model.untuned() as model:
            return tuned, example_losses(model, examples, pad_id=pad_id, batch_size=size)


@dataclass(frozen=True)
class _Tried:
    """A party's canaries under attack: the higher a score, the rather it was planted; exposure in bits, of so many."""

    scores: np.ndarray
    included: np.ndarray
    exposure_bits: np.ndarray
    among: int


def _bound_values(bound: LowerBound) -> dict[str, Any]:
    return {
        "epsilon_lower_bound": bound.epsilon,
        "delta": bound.delta,
        "confidence": 1 - SIGNIFICANCE,
        # A bound near it says that there were too few canaries.
        "largest_possible_bound": largest_bound(bound.best.canaries, bound.delta),
        "guesses": bound.best.guesses,
        "correct": bound.best.correct,
    }


def _exposure_values(tried: Sequence[_Tried]) -> dict[str, Any]:
    bits = np.concatenate([each.exposure_bits for each in tried])
    first = sum(int((each.exposure_bits >= math.log2(each.among) - 1e-9).sum()) for each in tried)
    return {
        "exposure_bits_mean": float(bits.mean()),
        "exposure_bits_max": float(bits.max()),
        "exposure_bits_possible": math.log2(max(each.among for each in tried)),
        "ranked_first": first,
    }
