"""Fixtures that many tests share. The helpers themselves are in tiny.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports transformers: no network, no advice, one thread as in the plan.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Drawn examples are the same in every run, on a fast machine and on a slow one; `make thorough` draws new ones.
settings.register_profile(
    "fedllm",
    derandomize=not os.environ.get("FEDLLM_THOROUGH"),
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fedllm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that no two of them are left to one process at the end.

    `make thorough` goes through them backwards: a test that hangs on what another left behind fails there.
    """
    if os.environ.get("FEDLLM_THOROUGH"):
        items.reverse()
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer."""
    from tiny import save_base

    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make_federation(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that writes a tiny federation into the test's own folder; see `tiny.tiny_federation`.

    Nothing waits for the disk: a test that cuts the power puts its own `os.fsync` in place.
    """
    from tiny import tiny_federation

    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def make(name: str = "federation", **changes: Any) -> Any:
        return tiny_federation(tmp_path / name, changes.pop("base", base), **changes)

    return make
