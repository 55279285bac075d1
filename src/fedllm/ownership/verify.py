"""What a claim proves of a suspect model: matches, exact p-values, the commitment's place, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fedllm.errors import ModelError
from fedllm.ownership.claims import Claim
from fedllm.ownership.disputes import Place, Standing
from fedllm.ownership.marks import scale_rows, unit_rows
from fedllm.ownership.statistics import corrected, p_value
from fedllm.ownership.suspect import READINGS, MergedSuspect, Suspect


@dataclass(frozen=True)
class Reading:
    """What one carrier of a claim shows, read in one way: bits that agree, and the chance of so many by luck."""

    carrier: str
    way: str
    matches: int
    num_bits: int
    p: float

    @property
    def unit(self) -> str:
        """What is counted: bits, or the secret answers of triggers."""
        return "answers" if self.carrier == "text" else "bits"


@dataclass(frozen=True)
class Verdict:
    """What comes of one claim. `p` is that of its best reading, corrected for all `tries` of all claims together."""

    party: str
    status: str
    sentence: str
    p: float
    tries: int
    threshold: float
    readings: tuple[Reading, ...]
    place: Place | None
    reasons: tuple[str, ...]

    @property
    def upheld(self) -> bool:
        """Whether the claim holds."""
        return self.status == "upheld"


def mark_values(claim: Claim, suspect: Suspect, way: str) -> torch.Tensor:
    """Return t of a suspect, (N,): bit j is read as 1 where it is above zero, and as nothing at zero.

    Args:
        claim: The claim.
        suspect: The suspect.
        way: One of `READINGS`.
    """
    total = torch.zeros(len(claim.bits))
    for site in claim.sites:
        if claim.carrier == "product":
            left, right = unit_rows(claim, site, "rows"), unit_rows(claim, site, "columns")
            total += suspect.product(site, left, right, way)
        else:
            total += scale_rows(claim, site) @ suspect.scale(site)
    return total


def read_marks(claim: Claim, suspect: Suspect) -> list[Reading]:
    """Return what the bits of a claim show in a suspect, once per way to read it.

    A bit whose value is exactly zero agrees with neither sign: a model that changed nothing proves nothing.

    Args:
        claim: The claim.
        suspect: The suspect.

    Raises:
        ModelError: `PEFT_TARGET`, none of the claim's weights is in the suspect under its name.
    """
    if not claim.bits:
        return []
    if not any(suspect.has(site) for site in claim.sites):
        raise ModelError(
            "PEFT_TARGET",
            f"the suspect has none of the {len(claim.sites)} weights in which the claim's bits are, such as "
            f"{claim.sites[0].name}",
            where="MODEL",
            fix="give its tensors the names that they have in the base model; a model of another shape has no mark",
        )
    is_whole = isinstance(suspect, MergedSuspect) and claim.carrier == "product"
    found, signs = [], torch.tensor(claim.signs())
    for way in READINGS if is_whole else READINGS[:1]:
        matches = int((mark_values(claim, suspect, way) * signs > 0).sum())
        found.append(Reading(claim.carrier, way, matches, len(signs), p_value(matches, len(signs))))
    return found


def judge(
    claims: Sequence[Claim],
    standings: Sequence[Standing | None],
    readings_of: Callable[[Claim], Sequence[Reading]],
) -> list[Verdict]:
    """Return a verdict on each claim. Of several that hold, the oldest commitment wins and the others are told so.

    Args:
        claims: The claims, opened.
        standings: Of each, from `standing`; None where no log is given, and then a claim cannot be upheld.
        readings_of: What a claim shows in the suspect.
    """
    each = [tuple(readings_of(claim)) for claim in claims]
    tries = sum(len(readings) for readings in each)
    drafts = [
        _verdict(claim, found, readings, tries) for claim, found, readings in zip(claims, standings, each, strict=True)
    ]
    dates = [draft.place.time for draft in drafts if draft.upheld and draft.place]
    return [_against_older(draft, drafts, min(dates)) if draft.upheld else draft for draft in drafts]


def _verdict(claim: Claim, found: Standing | None, readings: tuple[Reading, ...], tries: int) -> Verdict:
    p = corrected(min((reading.p for reading in readings), default=1.0), tries)
    reasons = found.reasons if found else ("no log is given, so nothing says when the key was chosen (E23)",)
    # Of a claim whose directions follow from the log, nothing can be read without one.
    is_read = bool(readings) or not reasons
    status = "not shown" if is_read and p > claim.threshold else "rejected" if reasons else "upheld"
    draft = Verdict(
        party=claim.party,
        status=status,
        sentence="",
        p=p,
        tries=tries,
        threshold=claim.threshold,
        readings=readings,
        place=found.place if found else None,
        reasons=reasons,
    )
    return _with_sentence(draft)


def _with_sentence(draft: Verdict) -> Verdict:
    return replace(draft, sentence=_sentence(draft))


def _sentence(draft: Verdict) -> str:
    best = min(draft.readings, key=lambda reading: reading.p, default=None)
    shows = (
        f"{best.matches} of {best.num_bits} {best.unit} of `{draft.party}`" if best else f"nothing of `{draft.party}`"
    )
    tries = "one try" if draft.tries == 1 else f"{draft.tries} tries"
    chance = f"p = {draft.p:.2g} after correction for {tries}, the threshold is {draft.threshold:.0e}"
    if draft.status == "not shown":
        return f"The claim is not shown: the model has {shows}, {chance}."
    if draft.status == "rejected":
        though = f", though the model has {shows} ({chance})" if best else ""
        return f"The claim is rejected{though}: {'; '.join(draft.reasons)}."
    since = f", and {draft.party} committed to it before {draft.place.time}" if draft.place else ""
    return f"The claim is upheld: the model has {shows}, {chance}{since}."


def _against_older(draft: Verdict, drafts: Sequence[Verdict], oldest: str) -> Verdict:
    """Return a verdict that is rejected where another claim on the same model is older; equal dates share it."""
    if draft.place is None or draft.place.time == oldest:
        return draft
    older = sorted(one.party for one in drafts if one.upheld and one.place and one.place.time == oldest)
    reason = f"the model has an older mark too, of {', '.join(older)}, committed to before {oldest}"
    return _with_sentence(replace(draft, status="rejected", reasons=(*draft.reasons, reason)))
