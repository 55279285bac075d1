"""Files of one JSON object a line that survive a crash: appended with fsync, a torn last line ignored."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedllm.disk import disk_error, sync_folder, write_atomic

Row = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN becomes null.

    Args:
        path: The file.
        value: What to write.
    """
    write_atomic(path, (json.dumps(finite(value), ensure_ascii=False, indent=2) + "\n").encode())


def finite(value: Any) -> Any:
    """Return the value with NaN and infinities as None, since JSON has neither.

    Args:
        value: A JSON-like value.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def encode_rows(rows: Iterable[Row]) -> bytes:
    """Return rows as lines of JSON; NaN becomes null.

    Args:
        rows: The rows.
    """
    lines = (json.dumps(finite(row), ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    return "".join(lines).encode()


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows durably. A torn last line, left by a crash, is cut off first.

    Args:
        path: The file; made if absent.
        rows: What to append.

    Raises:
        ResourceError: `DISK_FULL`.
    """
    try:
        is_new = not path.exists()
        _cut_torn_line(path)
        with path.open("ab") as handle:
            handle.write(encode_rows(rows))
            handle.flush()
            os.fsync(handle.fileno())
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from None


def _cut_torn_line(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read(1) != b"\n":
            data = path.read_bytes()
            handle.truncate(data.rfind(b"\n") + 1)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none if it is absent. What is not whole JSON is passed over.

    Args:
        path: The file.
    """
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
