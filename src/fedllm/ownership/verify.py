"""What a claim proves of a suspect model: matches, exact p-values, the commitment's place, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import torch

from fedllm.errors import ModelError
from fedllm.ownership.claims import Claim
from fedllm.ownership.disputes import Place, Standing
from fedllm.ownership.marks import scale_rows, unit_rows
from fedllm.ownership.statistics import THRESHOLD, corrected, p_value
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
    """What comes of one claim. `p` is that of its best reading, corrected for all `tries` of all claims together.

    `stamp_time` is what a verified time stamp says, in the log or in its place; else it is empty.
    """

    party: str
    commitment: str
    status: str
    sentence: str
    p: float
    tries: int
    threshold: float
    readings: tuple[Reading, ...]
    place: Place | None
    reasons: tuple[str, ...]
    stamp_time: str = ""

    @property
    def proven(self) -> str:
        """The date that others than the claimant's side bear out: an authority, or parties whose keys are known."""
        dates = [self.stamp_time] * bool(self.stamp_time)
        dates += [self.place.time] if self.place and self.place.confirmed else []
        return min(dates, key=datetime.fromisoformat, default="")

    @property
    def date(self) -> str:
        """Before when the party committed, proven or not; empty where nothing says so."""
        return self.proven or (self.place.time if self.place else "")

    @property
    def log(self) -> str:
        """What names the claim's log; claims of one log share a model. Without a log it is the claim's own."""
        return self.place.root if self.place else self.commitment

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
    *,
    threshold: float = THRESHOLD,
) -> list[Verdict]:
    """Return a verdict on each claim.

    Where claims of several logs hold, the oldest date wins that others than the claimant's side bear out. Where there
    is no such date, none of them is upheld: whoever writes a log by itself writes any date into it.

    Args:
        claims: The claims, opened.
        standings: Of each, from `standing`; None where no log is given, and then a claim cannot be upheld.
        readings_of: What a claim shows in the suspect.
        threshold: The arbiter's: largest p-value that holds. A claim's own may be stricter.
    """
    each = [tuple(readings_of(claim)) for claim in claims]
    tries = sum(len(readings) for readings in each)
    drafts = [
        _with_sentence(_draft(claim, found, readings, (tries, min(claim.threshold, threshold))))
        for claim, found, readings in zip(claims, standings, each, strict=True)
    ]
    rivals = [draft for draft in drafts if draft.upheld]
    if len({draft.log for draft in rivals}) < 2:
        return drafts
    return [_with_sentence(_among(draft, rivals)) if draft.upheld else draft for draft in drafts]


def _draft(claim: Claim, found: Standing | None, readings: tuple[Reading, ...], bar: tuple[int, float]) -> Verdict:
    tries, threshold = bar
    p = corrected(min((reading.p for reading in readings), default=1.0), tries)
    reasons = found.reasons if found else ("no log is given, so nothing says when the key was chosen (E23)",)
    # Of a claim whose directions follow from the log, nothing can be read without one.
    is_read = bool(readings) or not reasons
    status = "not shown" if is_read and p > threshold else "rejected" if reasons else "upheld"
    place = found.place if found else None
    return Verdict(
        party=claim.party,
        commitment=claim.commitment(),
        status=status,
        sentence="",
        p=p,
        tries=tries,
        threshold=threshold,
        readings=readings,
        place=place,
        reasons=reasons,
        stamp_time=place.stamp_time if place else found.stamp_time if found else "",
    )


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
    if draft.status == "undecided":
        return f"The claim is undecided: the model has {shows}, {chance}; {'; '.join(draft.reasons)}."
    since = f"{draft.party} committed to it before {draft.date}, {_by_whom(draft)}"
    return f"The claim is upheld: the model has {shows}, {chance}, and {since}."


def _by_whom(draft: Verdict) -> str:
    if draft.proven and draft.proven == draft.stamp_time:
        return "as a verified time stamp says"
    if draft.proven:
        return "as parties signed whose keys are known"
    return "by the word of those who signed the log"


def _among(draft: Verdict, rivals: Sequence[Verdict]) -> Verdict:
    """Return what comes of a claim beside others that hold, of other logs; equal dates share the model."""
    proven = [one for one in rivals if one.proven]
    if not proven:
        others = ", ".join(sorted({one.party for one in rivals if one.log != draft.log}))
        why = (
            f"the marks of {others} read too, and all dates rest on the word of the logs' own signers: attach time "
            "stamps (--tsa-certificate), or give --party-key"
        )
        return replace(draft, status="undecided", reasons=(why,))
    first = min(proven, key=_moment)
    logs = {one.log for one in proven if _moment(one) == _moment(first)}
    if draft.log in logs:
        return draft
    older = ", ".join(sorted({one.party for one in proven if one.log in logs}))
    why = f"the model has an older mark too, of {older}, committed to before {first.date}, {_by_whom(first)}"
    if not any(one.log == draft.log for one in proven):
        why = (
            f"the model has a mark of {older} too, committed to before {first.date}, {_by_whom(first)}; the date of "
            "this claim is by the word of those who signed its log"
        )
    return replace(draft, status="rejected", reasons=(why,))


def _moment(draft: Verdict) -> datetime:
    return datetime.fromisoformat(draft.proven)
