"""Named random streams: every draw is a function of (seed, labels), never of a global generator."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Held while something is changed that all threads of the process share: the global generators, the filters of
# warnings, and what transformers puts in place of its own functions while it loads a model.
PROCESS_STATE = threading.RLock()


def _key(seed: int, labels: tuple[str | int, ...]) -> bytes:
    text = json.dumps([seed, *labels], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def stream(seed: int, *labels: str | int) -> np.random.Generator:
    """Return the Philox generator named by the seed and the labels.

    Args:
        seed: The job's seed.
        labels: What the numbers are for, for example `("order", "north", 3)`.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key(seed, labels)[:16], "little")))


def torch_generator(seed: int, *labels: str | int) -> torch.Generator:
    """Return a CPU torch generator named by the seed and the labels."""
    return torch.Generator().manual_seed(int.from_bytes(_key(seed, labels)[:8], "little") >> 1)


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Leave the global generators of Python, numpy and torch as they were found.

    For code of others that draws from them, such as dropout and `transformers.Trainer`. One thread at a time.
    """
    with PROCESS_STATE, torch.random.fork_rng():
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def global_torch_stream(seed: int, *labels: str | int) -> Iterator[None]:
    """Run a block whose global torch draws (dropout) come from the named stream; put the old state back."""
    with global_generators_kept():
        torch.random.set_rng_state(torch_generator(seed, *labels).get_state())
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(int.from_bytes(_key(seed, labels)[:8], "little") >> 1)
        yield
