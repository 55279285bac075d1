"""Named random streams, and global generators left as they were found."""

from __future__ import annotations

import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fedllm.models.methods import quiet_peft
from fedllm.seeds import global_generators_kept, global_torch_stream, stream, torch_generator


def test_a_stream_is_named_by_its_seed_and_labels_and_by_nothing_else() -> None:
    first = stream(7, "order", "north", 3).integers(0, 2**62, 4).tolist()
    np.random.seed(1)
    assert stream(7, "order", "north", 3).integers(0, 2**62, 4).tolist() == first
    others = [(8, "order", "north", 3), (7, "order", "north", 4), (7, "order", "south", 3), (7, "order", "north")]
    others += [(7, "ordern", "orth", 3), (7, "order", "north", "3"), (7, "order", "north", 3, "")]
    draws = {tuple(stream(*name).integers(0, 2**62, 4).tolist()) for name in others}
    assert len(draws | {tuple(first)}) == len(others) + 1


def test_the_first_numbers_of_a_stream_are_these() -> None:
    # The same on every machine and with every version: numpy promises it for Philox bits.
    assert stream(0, "pinned").bit_generator.random_raw(2).tolist() == PINNED


PINNED = [5367359992591517305, 12452797852890844092]


def states() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_the_global_generators_are_put_back_whatever_was_drawn(fails: bool) -> None:
    before = states()
    for block in (global_generators_kept(), global_torch_stream(3, "dropout")):
        try:
            with block:
                random.random()
                np.random.rand()
                torch.rand(3)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert states() == before


def test_inside_the_block_torch_draws_from_the_named_stream() -> None:
    def drawn(*labels: str | int) -> list[float]:
        torch.rand(random.randrange(9))
        with global_torch_stream(3, *labels):
            return torch.rand(4).tolist()

    assert drawn("dropout", 1) == drawn("dropout", 1)
    assert drawn("dropout", 1) != drawn("dropout", 2)
    assert drawn("dropout", 1) == torch.rand(4, generator=torch_generator(3, "dropout", 1)).tolist()


def test_threads_that_draw_at_the_same_time_get_their_own_streams() -> None:
    def drawn(party: str) -> list[float]:
        with global_torch_stream(7, "dropout", party):
            return [float(torch.rand(1)) for _ in range(2000)]

    names = [f"party-{number}" for number in range(4)]
    alone = {name: drawn(name) for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
        assert dict(zip(names, pool.map(drawn, names), strict=True)) == alone


def test_threads_that_keep_warnings_back_leave_the_filters_as_they_were() -> None:
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first() -> None:
        with quiet_peft():
            first_is_in.set()
            second_is_in.wait(0.3)  # in vain: it leaves before the other comes in

    def second() -> None:
        first_is_in.wait()
        with quiet_peft():
            second_is_in.set()
            leaves.result()

    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        leaves = pool.submit(first)
        pool.submit(second).result()
    assert warnings.filters == before
