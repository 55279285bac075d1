"""Write the demo's data files: a training file for each party and the common test file, then the digests."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from fedllm.data.adverts import DEMO, Record, common_test, party_examples

ASSETS = Path(__file__).parent.parent / "src" / "fedllm" / "assets" / "demo"
DIGESTS = "DIGESTS.json"


def main() -> None:
    """Write the data and renew the digests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "data", help="folder to write")
    out = parser.parse_args().out
    write_data(out)
    if out == ASSETS / "data":
        write_digests()


def write_data(out: Path) -> None:
    """Write `<party>/train.jsonl` for each party and `test.jsonl` under the folder."""
    for party, records in party_examples(DEMO).items():
        _write_jsonl(out / party / "train.jsonl", records)
    _write_jsonl(out / "test.jsonl", common_test(DEMO))


def write_digests() -> None:
    """Write the SHA-256 of every file under the assets, by its path there."""
    text = json.dumps(digests(ASSETS), indent=2, sort_keys=True) + "\n"
    (ASSETS / DIGESTS).write_text(text, encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file under the folder except the digests themselves, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != DIGESTS)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write_jsonl(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
