"""What commands print: data on stdout, progress and errors on stderr, one JSON envelope for `--json`."""

from __future__ import annotations

import json
import sys
from typing import Any

from fedllm.errors import ExitCode, FedllmError


def print_json(data: Any, *, status: str = "ok", exit_code: int = ExitCode.OK) -> None:
    """Print the envelope that every command shares under `--json`.

    Args:
        data: What the command has to say, JSON-serialisable.
        status: `ok`, or the verdict of a run.
        exit_code: The code the process will exit with.
    """
    envelope = {"schema_version": 1, "status": status, "exit_code": int(exit_code), "data": data}
    sys.stdout.write(json.dumps(envelope, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def print_error(error: FedllmError, *, as_json: bool = False) -> None:
    """Print an error and those found with it: text on stderr, or the envelope on stdout under `--json`.

    Args:
        error: The error to show.
        as_json: Whether the command ran with `--json`.
    """
    errors = [error, *error.also]
    if as_json:
        found = [{"code": e.code, "what": e.what, "where": e.where, "fix": e.fix} for e in errors]
        print_json(found[0] | {"also": found[1:]}, status="error", exit_code=error.exit_code)
        return
    for each in errors:
        sys.stderr.write(f"error {each}\n  see: docs/reference/errors.md#{each.code.lower()}\n")
