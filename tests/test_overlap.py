"""The overlap pass: gathers start before earlier products, sums are collected later, and the numbers stay."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from typing import cast as cast_to

import pytest
import torch

from mtl.kernels import copy_engine
from mtl.runtime.overlap import DISTANCE
from tests.interpreter import interpret
from tests.ranks import Ranks


@pytest.mark.parametrize(
    ("precision", "engine"),
    [
        pytest.param("fp64", False, id="sums"),
        pytest.param("bf16", False, id="exchanges", marks=pytest.mark.slow),
        pytest.param("bf16", True, id="engine"),
    ],
)
def test_gathers_start_ahead_and_sums_end_behind(ranks: Ranks, precision: str, engine: bool) -> None:
    found = ranks.run("tests.cases.overlap:distances", 2, precision=precision, engine=engine)
    plain, moved = found["plain"], found["overlap"]
    assert plain["gather"] == 0, "as traced, every gather is waited for before any product"
    assert moved["gather"] >= 0.8 and moved["scatter"] > plain["scatter"], found
    assert moved["gathers"] == plain["gathers"] > 15 and moved["scatters"] == plain["scatters"] > 8
    assert moved["in_flight"] <= 3, "no more than two gathers wait ahead"
    assert found["same"], "the moved graph gives bitwise the same result"


def test_sums_have_slots_for_all_that_are_under_way() -> None:
    """A sum is sent while so many before it are not collected: with a slot less it would wait for itself."""
    assert all(copy_engine.slots("sum", size)[0] > DISTANCE for size in (1, 1 << 32))


def torn(slots: int, seed: int, early: int = 0) -> bool:
    """Run gathers of three members, whose streams go on in any order: tell whether one wrote a slot that another had not read.

    ``early`` lets members take more for seen than they saw.
    """
    draw, size, count, empty = random.Random(seed), 3, 14, SimpleNamespace()
    late = [draw.randint(1, slots) for _ in range(count)]
    cast, offered, read, arrived = [0] * size, [0] * size, [[0] * size for _ in range(size)], [0] * size
    streams: list[list[tuple[Any, Any]]] = []  # what each waits for, and what it does then
    overwritten: list[bool] = []

    def main(me: int) -> Iterator[tuple[Any, Any]]:
        channel = copy_engine.Channel(slots, 0, torch.empty(0), empty, cast_to(torch.cuda.Stream, empty), [])

        def write() -> None:
            overwritten.append(any(read[other][me] < cast[me] - slots + 1 for other in range(size) if other != me))
            cast[me] += 1

        for n in range(count):
            if n >= late[n]:
                channel.seen = max(channel.seen, n - late[n] + 1 + early)
                yield (lambda n=n: arrived[me] > n - late[n]), lambda: None
            if not channel.is_free(n):
                yield (lambda n=n: all(read[other][me] > n - slots for other in range(size) if other != me)), lambda: None
            yield (lambda: True), write

    def side(me: int) -> Iterator[tuple[Any, Any]]:
        for n in range(count):
            yield (lambda n=n: cast[me] > n), lambda n=n: offered.__setitem__(me, n + 1)
            for step in range(1, size):
                other = (me + step) % size
                yield (lambda n=n, other=other: offered[other] > n), lambda n=n, other=other: read[me].__setitem__(other, n + 1)
            yield (lambda: True), lambda n=n: arrived.__setitem__(me, n + 1)

    streams = [list(stream(me)) for me in range(size) for stream in (main, side)]
    while any(streams):
        able = [stream for stream in streams if stream and stream[0][0]()]
        assert able, "all wait for each other"
        draw.choice(able).pop(0)[1]()
    return any(overwritten)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_slot_that_is_taken_for_free_has_been_read(slots: int) -> None:
    assert not any(torn(slots, seed) for seed in range(300))


def test_and_one_gather_less_would_not_do() -> None:
    assert any(torn(4, seed, early=1) for seed in range(300))


def test_who_waits_for_a_gather_has_seen_it() -> None:
    """And who has seen one does not wait for the slot of the third after it, of four."""
    channel = copy_engine.Channel(4, 0, torch.empty(0), None, cast_to(torch.cuda.Stream, None), [])
    assert channel.is_free(3) and not channel.is_free(4)
    arrival = copy_engine._Arrival.__new__(copy_engine._Arrival)
    arrival.channel, arrival.number, arrival.event = channel, 1, SimpleNamespace(wait=lambda: None)
    assert arrival.wait() and channel.seen == 2 and channel.is_free(4) and not channel.is_free(5)


def test_the_kernels_beside_copy_engines_are_plain_sums_and_casts() -> None:
    """Under Triton's interpreter."""
    interpret("engine_kernels", "check('cpu')")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_have_the_same_bits_on_a_gpu() -> None:
    from tests.cases import engine_kernels

    engine_kernels.check("cuda")
