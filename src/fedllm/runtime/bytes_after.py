"""Bytes of what follows a committed round: it is counted in rows of its own, since the round's rows are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedllm.runs.folder import RunFolder
from fedllm.runtime.federation import LinkedFederation


@contextmanager
def counted_after(run: RunFolder, federation: LinkedFederation, number: int) -> Iterator[None]:
    """Write what is sent in the context as the metrics `bytes_after_up` and `bytes_after_down` of a round.

    A crash within it loses these two rows of the round, and nothing else.

    Args:
        run: The run folder.
        federation: That sends it.
        number: The round, which is committed.
    """
    before = federation.ledger.of_round(number)
    yield
    after = federation.ledger.of_round(number)
    rows = [
        {"round": number, "party": party, "split": None, "name": f"bytes_after_{way}", "value": sent}
        for (party, way), count in sorted(after.items())
        if (sent := count - before.get((party, way), 0))
    ]
    if rows:
        run.rows().append(rows)
