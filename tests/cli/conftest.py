"""Fixtures for the tests of the command line."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from verbs import Call

from fedllm.cli import main


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return a function that runs `fedllm WORDS` in this process and returns (exit code, stdout, stderr)."""
    handlers = logging.getLogger().handlers[:]

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedllm", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        logging.getLogger().handlers[:] = handlers
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run
