"""What a run notes about a party's data, at the party: how many examples, and a digest to know them by on resume."""

from __future__ import annotations

import hashlib
import json

from fedllm.errors import DataError
from fedllm.runs.folder import RunFolder
from fedllm.runs.jsonl import write_json
from fedllm.scenarios.base import TokenData


def check_data_unchanged(run: RunFolder, party: str, tokens: TokenData) -> None:
    """Note the digest of a party's data at the party; on resume, refuse data that changed.

    Args:
        run: The run folder.
        party: The party.
        tokens: Its data.

    Raises:
        DataError: `DATA_CHANGED`.
    """
    text = repr([[example.input_ids for example in split] for split in (tokens.train, tokens.held_out)])
    facts = {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "train_examples": len(tokens.train),
        "held_out_examples": len(tokens.held_out),
    }
    path = run.path / "parties" / party / "data.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, facts)
    elif json.loads(path.read_text(encoding="utf-8")) != facts:
        raise DataError(
            "DATA_CHANGED",
            "the party's data are not those that the run began with",
            where=f"party {party}",
            fix="put the old data back, or start a new run",
        )


def party_facts(run: RunFolder, party: str) -> dict[str, str | int | None]:
    """Return a party's name and numbers of examples; None for those of a party at another machine.

    Args:
        run: The run folder.
        party: The party.
    """
    path = run.path / "parties" / party / "data.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"party": party, **{name: facts.get(name) for name in ("train_examples", "held_out_examples")}}
