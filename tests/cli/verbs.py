"""What the tests of the command line share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# (words) -> (exit code, stdout, stderr)
Call = Callable[..., tuple[int, str, str]]


def data_of(out: str) -> Any:
    """Return what a verb's `--json` holds."""
    envelope = json.loads(out)
    assert set(envelope) == {"schema_version", "status", "exit_code", "data"}
    return envelope["data"]
