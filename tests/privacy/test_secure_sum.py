"""Secure sums: exact with every drop-out that they bear, closed beyond it, and deaf to a server that lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sums import CONTEXT, STEPS, Sum, plain_sum, signatures, vectors_of
from tiny import THOROUGH, thorough

from fedllm.errors import PayloadError, RunPaused
from fedllm.privacy.secure_sum import LEAST_PARTIES, Keys, Member, least_of
from fedllm.privacy.words import Words
from fedllm.seeds import stream

FIVE = ["north", "east", "south", "west", "centre"]


def names_of(count: int) -> list[str]:
    return [f"p{number:02d}" for number in range(count)]


def same(first: Words, second: Words) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def finished(sum_: Sum, vectors: dict[str, Words]) -> Words:
    sum_.prepare()
    sum_.gather(vectors)
    return sum_.open()


CASES = 1000 if THOROUGH else 250
CHUNKS = 10


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_sums_with_drop_outs_equal_the_plain_ones(chunk: int) -> None:
    draw = stream(5, "secure sums", chunk)
    # Small sums come more often than large ones, whose keys take most of the time; every size from 3 to 50 comes.
    for case in range(CASES // CHUNKS):
        number = chunk * CASES // CHUNKS + case
        count = 3 + number // 20 % 48 if case % 20 == 0 else int(draw.integers(3, 8))
        names = names_of(count)
        bears = count - least_of(count, threshold=None, fewest=0)
        gone = draw.permutation(names)[: draw.integers(0, bears + 1)]
        dropped = {str(name): STEPS[int(draw.integers(0, 5))] for name in gone}
        # Who is gone before the keys are shown does not count among those who began.
        began = count - sum(step == "keys" for step in dropped.values())
        later = count - len(dropped)
        vectors = vectors_of(names, draw)
        sum_ = Sum(names, dropped)
        if later < least_of(began, threshold=None, fewest=0):
            with pytest.raises(RunPaused):
                finished(sum_, vectors)
            continue
        inside = [name for name in names if dropped.get(name) not in ("keys", "shares", "answer")]
        assert same(finished(sum_, vectors), plain_sum(vectors, inside)), (count, dropped)


def borne(count: int, step: str) -> int:
    """Return how many of so many may drop out after a step. Who shows no keys does not count among those who began."""
    fewest = LEAST_PARTIES if step == "keys" else least_of(count, threshold=None, fewest=0)
    return count - fewest


SIZES = [3, 4, 5, 7, 12, *(pytest.param(count, marks=thorough) for count in (20, 35, 50))]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", SIZES)
def test_every_number_of_drop_outs_at_every_step(count: int, step: str) -> None:
    names, draw, signed = names_of(count), stream(6, "steps", count, step), signatures(names_of(count))
    for gone in range(borne(count, step) + 2):
        # Anybody may be gone, not only those at one end.
        dropped = draw.permutation(names)[:gone].tolist()
        vectors, sum_ = vectors_of(names, draw), Sum(names, dict.fromkeys(dropped, step), signed=signed)
        if gone <= borne(count, step):
            inside = names if step in ("agreement", "opening") else [name for name in names if name not in dropped]
            assert same(finished(sum_, vectors), plain_sum(vectors, inside))
            continue
        with pytest.raises(RunPaused) as caught:
            finished(sum_, vectors)
        assert caught.value.code == "SUM_ABORTED"
        # What was added up is gone, masked as it was.
        assert not sum_.combiner._words


def is_in_memory(shifted: np.ndarray) -> bool:
    """Return whether this process holds an array anywhere, whose words are each one less than those given.

    Only the shifted words are known here, or the search would find itself.
    """
    regions = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if " rw" in line]
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        for start, end in ((int(first, 16), int(last, 16)) for first, last in regions):
            for at in range(start, end, 2**24):
                try:
                    memory.seek(at)
                    data = memory.read(min(2**24 + 64, end - at))
                except OSError:
                    break
                words = np.frombuffer(data, np.uint32, len(data) // 4)
                for place in np.flatnonzero(words == shifted[0] - np.uint32(1)):
                    if np.array_equal(words[place : place + 16] + np.uint32(1), shifted):
                        return True
    return False


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no memory to be looked through here")
@pytest.mark.parametrize("finishes", [True, False])
def test_a_sum_that_is_aborted_is_nowhere_in_memory_and_one_that_is_opened_would_be_found(finishes: bool) -> None:
    vectors = vectors_of(FIVE, stream(7, "abort"), size=16)
    sum_ = Sum(FIVE, {} if finishes else {"north": "agreement", "east": "agreement"})
    sum_.prepare()
    sum_.gather(vectors)
    if finishes:
        opened = sum_.open()
    else:
        with pytest.raises(RunPaused):
            sum_.open()
        opened = {}
    # From ones on, so that the sum itself is never made here.
    shifted = np.ones(16, np.uint32)
    for name in FIVE:
        shifted += vectors[name]["narrow"]
    assert is_in_memory(shifted) == finishes == bool(opened)
    assert finishes or not sum_.combiner._words


@pytest.mark.parametrize(
    ("parties", "threshold", "expected"),
    [(3, None, 3), (4, None, 3), (5, None, 4), (6, None, 5), (10, None, 7), (50, None, 34), (10, 6, 6), (10, 2, 6)],
)
def test_how_many_must_stay(parties: int, threshold: int | None, expected: int) -> None:
    assert least_of(parties, threshold=threshold, fewest=0) == expected


@pytest.mark.parametrize("value", [0, 2**32 - 1, 12345])
def test_what_leaves_a_party_is_uniform_whatever_goes_in(value: int) -> None:
    sum_ = Sum(FIVE)
    sum_.prepare()
    words = {"narrow": np.full(2**18, value, np.uint32)}
    sum_.members["north"].mask(words)
    for shift in (0, 8, 16, 24):
        found = np.bincount((words["narrow"] >> np.uint32(shift)) & np.uint32(255), minlength=256)
        chi_square = float(((found - 1024.0) ** 2 / 1024).sum())
        # Of 255 degrees of freedom: beyond six standard deviations.
        assert abs(chi_square - 255) < 6 * (2 * 255) ** 0.5


def test_two_sums_of_the_same_vectors_have_no_mask_in_common() -> None:
    signed, draw = signatures(FIVE), stream(8, "masks")
    vectors, seen = vectors_of(FIVE, draw, size=1000), []
    for _ in range(2):
        sum_ = Sum(FIVE, signed=signed)
        sum_.prepare()
        words = {key: array.copy() for key, array in vectors["north"].items()}
        sum_.members["north"].mask(words)
        seen.append(words["narrow"])
    assert (seen[0] == seen[1]).mean() < 0.01


def seen_by_floats(update: np.ndarray, number: int) -> np.ndarray:
    """Return an update behind a fresh real-valued mask that is uniform between -1 and 1, in units of that bound."""
    return np.asarray(update + np.random.default_rng([10, number]).uniform(-1, 1, len(update)))


def seen_by_ours(update: np.ndarray, number: int) -> np.ndarray:
    """Return an update as it leaves a party of another sum, in units of half the ring."""
    sum_ = Sum(FIVE[:3])
    sum_.prepare()
    words = {"narrow": (update * 2**31).astype(np.int64).astype(np.uint32)}
    sum_.members["north"].mask(words)
    return words["narrow"].view(np.int32) / 2**31


def recovered(seen: list[np.ndarray]) -> np.ndarray:
    """Return the likeliest update of one that was seen behind several masks between -1 and 1.

    No mask is beyond its bound, so the update lies between the largest seen - 1 and the smallest seen + 1.
    """
    return np.asarray((np.max(seen, axis=0) + np.min(seen, axis=0)) / 2)


def test_bounded_float_masks_give_signs_away_at_once_and_ours_do_not() -> None:
    # Source: algorithms of other frameworks, whose masks are bounded floats. What lies beyond the bound of the mask
    # shows the sign of the update, and settles which of two candidates it was.
    update = np.random.default_rng(9).standard_normal(200_000) * 0.01
    candidate = update + np.random.default_rng(11).standard_normal(len(update)) * 1e-3
    for look, gives_away in ((seen_by_floats, True), (seen_by_ours, False)):
        seen = look(update, 0)
        extreme = np.argsort(np.abs(seen))[-500:]
        right = float((np.sign(seen[extreme]) == np.sign(update[extreme])).mean())
        refuted = [int((np.abs(seen - guess) > 1).sum()) for guess in (update, candidate)]
        if gives_away:
            assert right == 1 and refuted[0] == 0 and refuted[1] > 30
        else:
            assert abs(right - 0.5) < 0.12 and abs(refuted[0] - refuted[1]) < 6 * refuted[0] ** 0.5 + 6


def test_updates_behind_bounded_float_masks_are_recovered_in_some_rounds_and_ours_are_not() -> None:
    """A party that trains on the same data moves nearly the same way in every round, and each round has a new mask."""
    draw = np.random.default_rng(12)
    update = draw.standard_normal(2000) * 0.02
    rounds = [update + draw.standard_normal(len(update)) * 0.002 for _ in range(300)]
    for look, gives_away in ((seen_by_floats, True), (seen_by_ours, False)):
        guess = recovered([look(moved, number) for number, moved in enumerate(rounds)])
        # As a share of the update; who guesses zeros is wrong by 1.
        error = float(np.linalg.norm(guess - update) / np.linalg.norm(update))
        alike = float(np.corrcoef(guess, update)[0, 1])
        if gives_away:
            assert error < 0.4 and alike > 0.93
        else:
            # Of 2000 values that have nothing to do with each other: within six standard deviations.
            assert error > 0.95 and abs(alike) < 6 / 2000**0.5


# A server that lies.


def test_a_server_that_shows_two_lists_of_those_in_the_sum_opens_nothing() -> None:
    sum_ = Sum(FIVE)
    sum_.prepare()
    sum_.gather(vectors_of(FIVE, stream(10, "lies")))
    lists = {name: FIVE if name in ("north", "east") else FIVE[:4] for name in FIVE[:4]}
    signed = {name: sum_.members[name].agree(lists[name], "asked") for name in lists}
    for name in lists:
        with pytest.raises(PayloadError, match="SUM_REFUSED"):
            sum_.members[name].open(signed)


def test_a_server_that_asks_two_parties_for_different_things_opens_nothing() -> None:
    sum_ = Sum(FIVE)
    sum_.prepare()
    sum_.gather(vectors_of(FIVE, stream(11, "lies")))
    signed = {name: sum_.members[name].agree(FIVE, f"model {name in ('north', 'east')}") for name in FIVE}
    for name in FIVE:
        with pytest.raises(PayloadError, match="SUM_REFUSED"):
            sum_.members[name].open(signed)


def test_a_server_that_shows_two_lists_of_keys_opens_nothing() -> None:
    signed = signatures(FIVE)
    sum_, other = Sum(FIVE, signed=signed), Sum(FIVE, signed=signed)
    keys = {name: sum_.members[name].keys() for name in FIVE}
    forged = keys | {"centre": other.members["centre"].keys()}
    sum_.combiner.keys = keys
    sealed = {name: sum_.members[name].seal(forged if name == "north" else keys) for name in FIVE}
    sum_.combiner.sealed = sealed
    for name in FIVE:
        sum_.members[name].take(sum_.combiner.addressed_to(name))
    sum_.gather(vectors_of(FIVE, stream(12, "keys")))
    agreed = {name: sum_.members[name].agree(FIVE, "asked") for name in FIVE}
    with pytest.raises(PayloadError, match="SUM_REFUSED"):
        sum_.members["north"].open(agreed)
    # The four others were told the same, and are enough.
    assert sum_.members["east"].open(agreed).seeds


def ready() -> Sum:
    sum_ = Sum(FIVE)
    sum_.prepare()
    sum_.gather(vectors_of(FIVE[:4], stream(13, "ready")) | vectors_of(FIVE[4:], stream(14, "ready")))
    return sum_


def test_shares_are_given_once_and_of_each_party_of_one_kind() -> None:
    sum_ = Sum(FIVE, {"centre": "answer"})
    sum_.prepare()
    sum_.gather(vectors_of(FIVE, stream(15, "once")))
    member = sum_.members["north"]
    signed = {name: sum_.members[name].agree(FIVE[:4], "asked") for name in FIVE[:4]}
    opening = member.open(signed)
    assert set(opening.seeds) == set(FIVE[:4]) and set(opening.keys) == {"centre"}
    # Neither again, nor the other kind.
    for again in (lambda: member.open(signed), lambda: member.agree(FIVE[:3], "asked"), lambda: member.mask({})):
        with pytest.raises(PayloadError, match="SUM_REFUSED"):
            again()


def test_a_party_agrees_once_and_only_on_sums_that_it_is_in() -> None:
    for survivors in (FIVE[1:], FIVE[:2], [*FIVE, "stranger"], [*FIVE, "north"]):
        sum_ = ready()
        with pytest.raises(PayloadError, match="SUM_REFUSED"):
            sum_.members["north"].agree(survivors, "asked")
    sum_ = ready()
    sum_.members["north"].agree(FIVE, "asked")
    with pytest.raises(PayloadError, match="SUM_REFUSED"):
        sum_.members["north"].agree(FIVE[:4], "asked")


def test_signatures_of_an_older_sum_open_nothing() -> None:
    signed = signatures(FIVE)
    older, newer = (Sum(FIVE, signed=signed) for _ in range(2))
    found = []
    for sum_ in (older, newer):
        sum_.prepare()
        sum_.gather(vectors_of(FIVE, stream(16, "older")))
        found.append({name: sum_.members[name].agree(FIVE, "asked") for name in FIVE})
    with pytest.raises(PayloadError, match="SUM_REFUSED"):
        newer.members["north"].open(found[0])


@pytest.mark.parametrize("lie", ["two parties", "a stranger", "no signature", "of another sum", "own keys", "one key"])
def test_keys_that_are_not_as_they_should_be_are_refused(lie: str) -> None:
    signed = signatures([*FIVE, "stranger"])
    sum_ = Sum(FIVE, signed=signed)
    keys = {name: sum_.members[name].keys() for name in FIVE}
    other = Sum(FIVE, signed=signed, context=b"another sum")
    stranger = Member("stranger", CONTEXT, ["stranger"], sum_.least, signed["stranger"])
    changed: dict[str, dict[str, Keys]] = {
        "two parties": {name: keys[name] for name in FIVE[:2]},
        "a stranger": keys | {"stranger": stranger.keys()},
        "no signature": keys | {"east": replace(keys["east"], signature=keys["west"].signature)},
        "of another sum": keys | {"east": other.members["east"].keys()},
        "own keys": keys | {"north": replace(keys["north"], seal_key=keys["east"].seal_key)},
        "one key": {name: keys["north"] for name in FIVE},
    }
    with pytest.raises(PayloadError, match="SUM_REFUSED"):
        sum_.members["north"].seal(changed[lie])


def test_the_server_cannot_read_shares_and_changed_ones_are_found() -> None:
    sum_ = Sum(FIVE, {"centre": "answer"})
    sum_.prepare()
    text = sum_.combiner.sealed["north"]["east"]
    member = Member("east", CONTEXT, FIVE, sum_.least, sum_.signed["east"])
    # With keys of its own the server opens nothing.
    member._keys = sum_.combiner.keys
    assert member._opened("north", text) is None
    assert sum_.members["east"]._opened("north", text[:-2] + ("00" if text[-2:] != "00" else "01")) is None
    assert sum_.members["east"]._opened("north", text) is not None


def test_wrong_shares_are_found_and_worked_around_as_long_as_enough_are_right() -> None:
    for wrong, works in ((1, True), (2, False)):
        sum_, vectors = Sum(FIVE), vectors_of(FIVE, stream(17, "wrong"))
        sum_.prepare()
        sum_.gather(vectors)
        signed = {name: sum_.members[name].agree(FIVE, "asked") for name in FIVE}
        openings = {name: sum_.members[name].open(signed) for name in FIVE}
        for name in FIVE[:wrong]:
            seeds = {party: "00" + share[2:-2] + "11" for party, share in openings[name].seeds.items()}
            openings[name] = replace(openings[name], seeds=seeds)
        if works:
            assert same(sum_.combiner.opened(openings), plain_sum(vectors, FIVE))
        else:
            with pytest.raises(RunPaused, match="SUM_ABORTED"):
                sum_.combiner.opened(openings)
            assert not sum_.combiner._words


def test_a_vector_is_added_once_and_only_of_who_shared() -> None:
    sum_ = Sum(FIVE, {"centre": "shares"})
    sum_.prepare()
    vectors = vectors_of(FIVE, stream(18, "twice"))
    sum_.combiner.add("north", vectors["north"])
    for name in ("north", "centre", "stranger"):
        with pytest.raises(PayloadError, match="SUM_REFUSED"):
            sum_.combiner.add(name, vectors["east"])


def test_secrets_do_not_show_when_a_half_is_printed() -> None:
    sum_ = Sum(FIVE)
    sum_.prepare()
    text = repr(sum_.members["north"])
    assert sum_.members["north"]._seed.hex() not in text and "_seed=" not in text and "_shares=" not in text
