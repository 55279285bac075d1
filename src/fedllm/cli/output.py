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
    """Print an error: text on stderr, or the envelope on stdout under `--json`.

    Args:
        error: The error to show.
        as_json: Whether the command ran with `--json`.
    """
    if as_json:
        data = {"code": error.code, "what": error.what, "where": error.where, "fix": error.fix}
        print_json(data, status="error", exit_code=error.exit_code)
        return
    lines = [f"error {error}", f"  see: docs/reference/errors.md#{error.code.lower()}"]
    sys.stderr.write("\n".join(lines) + "\n")
