"""What a report and a model card say of a model that is claimed: by whom, committed to when, and the log's head."""

from __future__ import annotations

from fedllm.errors import StateLost
from fedllm.ownership.log import FOLDER, OwnershipLog, check_log, read_log
from fedllm.runs.report_data import RunRecord
from fedllm.runs.report_events import clock_text

_CARD = """- **This adapter carries secret marks** of {count} of the parties, which committed to them before it was
  trained. Head of the log of commitments: {size} entries, root `{root}`.
"""


def ownership_facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return the lines of a report's section on ownership; none where nobody claims the model.

    Args:
        record: What the run folder says.
    """
    claimants = record.setting("ownership.claimants")
    if not claimants:
        return []
    facts = [("Claimants", ", ".join(map(str, claimants))), *_marks(record)]
    log = _log(record)
    if log is None:
        return [*facts, ("Log of commitments", "damaged: it is not as the parties signed it")]
    if not log.heads:
        return [*facts, ("Log of commitments", "not there yet")]
    opening, newest = log.heads[0], log.heads[-1]
    for index, commitment in log.commitments():
        facts.append((f"Commitment of {commitment.party}", f"entry {index}, {commitment.digest}"))
    when, signers = clock_text(opening.head.time), ", ".join(sorted(opening.signatures))
    facts.append(("Signed before round 0", f"{when} UTC by {signers}"))
    facts.append(("Newest head", f"round {newest.head.round}, {newest.head.size} entries, root {newest.head.root}"))
    return facts


def _marks(record: RunRecord) -> list[tuple[str, str]]:
    carrier, triggers = record.setting("ownership.carrier"), record.setting("ownership.num_triggers")
    bits = f"{record.setting('ownership.num_bits')} bits each, carrier: {carrier}"
    return [("Mark", bits)] * (carrier != "none") + [("Secret answers", f"{triggers} each")] * bool(triggers)


def card_line(record: RunRecord) -> str:
    """Return what a model card says of marks; it names no party. Empty where nobody claims the model.

    Args:
        record: What the run folder says.
    """
    log = _log(record) if record.setting("ownership.claimants") else None
    if log is None or not log.heads:
        return ""
    head = log.heads[-1].head
    return _CARD.format(count=len(log.commitments()), size=head.size, root=head.root)


def _log(record: RunRecord) -> OwnershipLog | None:
    folder = record.path / FOLDER
    try:
        log = read_log(folder)
        if log.heads:
            check_log(log, where=folder)
    except StateLost:
        return None
    return log
