"""Feeding: batch sizes as pure functions, batches made ahead, and the same global batches on any mesh, micro-batch and worker count."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sharding_rules
from mtl.axes import MESH_AXES
from mtl.data.batch_sizes import BatchSizes, by_samples, constant, ramp, read_schedule
from mtl.data.batches import BatchShape, host_batch
from mtl.data.blend import Blend
from mtl.data.dataset import Blended
from mtl.data.feed import Feed
from mtl.data.samples import Documents
from mtl.data.stream import Reading, Stream
from mtl.errors import LocalError, UserError
from mtl.sharding.mesh import Mesh, MeshShape
from mtl.sharding.parallel import Parallel
from tests.corpora import numbered

One = Callable[..., Parallel]
CPU = torch.device("cpu")

# ---------------------------------------------------------------- sizes


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 20)), min_size=1, max_size=6), st.integers(0, 200))
def test_sizes_are_what_a_loop_would_take(points: list[tuple[int, int]], steps: int) -> None:
    points = [(0, points[0][1]), *sorted(points[1:])]
    sizes, taken = by_samples(points), 0
    for step in range(steps):
        assert sizes.before(step) == taken
        want = [size for at, size in points if at <= taken][-1]
        assert sizes.size(step) == want
        taken += want


@given(st.integers(1, 20), st.integers(1, 10), st.integers(0, 8), st.integers(1, 500))
def test_rampup_is_megatrons(start: int, increment: int, count: int, samples: int) -> None:
    final = start + increment * count
    sizes, taken = ramp(start, increment, samples, final), 0
    for step in range(120):
        want = final if taken > samples or not count else min(final, start + int(taken / (samples / count) + 1e-9) * increment)
        assert sizes.size(step) == want and sizes.before(step) == taken
        taken += want


def test_schedules() -> None:
    assert constant(8) == BatchSizes((0,), (8,))
    steps = read_schedule("8:10 16:30", "steps", 64, 32)
    assert [steps.size(i) for i in (0, 9, 10, 29, 30, 99)] == [8, 8, 16, 16, 32, 32]
    assert steps.before(31) == 80 + 320 + 32
    tokens = read_schedule("2:1024,4:4096", "tokens", 64, 8)
    assert [tokens.size(i) for i in (0, 7, 8, 19, 20)] == [2, 2, 4, 4, 8]
    assert read_schedule("2:16", "samples", 64, 8).starts == (0, 8)
    for bad in ("", "8", "8:", "0:10", "8:10 16:10", "8:x", "a:10", "8:inf"):
        with pytest.raises(UserError, match=r"batch\.schedule is"):
            read_schedule(bad, "steps", 64, 32)
    for rampup in ((0, 1, 10), (8, 0, 10), (8, 5, 10), (40, 8, 10), (8, 8, 0)):
        with pytest.raises(UserError, match=r"batch\.rampup is"):
            ramp(*rampup, 32)


# ---------------------------------------------------------------- the feed


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 10), st.lists(st.integers(0, 19), max_size=8))
def test_threads_change_nothing(workers: int, ahead: int, first: int, jumps: list[int]) -> None:
    feed = Feed(lambda i: {"x": torch.tensor([i])}, range(first, 20), CPU, workers, ahead)
    for i in [*range(first, 20), *jumps]:
        assert feed(i)["x"].tolist() == [i]
    feed.close()


def test_batches_are_made_ahead_and_waiting_is_told() -> None:
    made: list[tuple[int, str]] = []

    def make(i: int) -> dict[str, torch.Tensor]:
        time.sleep(0.05)
        made.append((i, threading.current_thread().name))
        return {"x": torch.zeros(1)}

    feed = Feed(make, range(8), CPU, workers=1, ahead=3)
    feed(0)
    assert feed.waited >= 0.04
    time.sleep(0.3)
    assert [i for i, _ in made] == [0, 1, 2, 3] and all(name.startswith("data") for _, name in made), "no further than asked"
    feed(1)
    assert feed.waited < 0.04
    feed.close()
    alone = Feed(make, range(8), CPU, workers=0)
    alone(0)
    assert alone.waited >= 0.04 and made[-1] == (0, threading.main_thread().name)


def test_an_error_comes_out_where_the_batch_is_asked_for() -> None:
    def make(i: int) -> dict[str, torch.Tensor]:
        if i == 2:
            raise UserError("corpus c, document 5: token 7 is 300")
        return {}

    feed = Feed(make, range(5), CPU, workers=2, ahead=4)
    feed(0)
    feed(1)
    with pytest.raises(LocalError, match="document 5"):
        feed(2)
    feed.close()


# ---------------------------------------------------------------- the same global batches

SEQ = 16
CUTS = [
    ("single", MeshShape()),
    ("ddp", MeshShape(replica=4)),
    ("fsdp", MeshShape(fsdp=2)),
    ("hsdp", MeshShape(replica=2, fsdp=2)),
    ("ring", MeshShape(fsdp=2, context=2)),
    ("fsdp_context_tensor", MeshShape(fsdp=2, context=2, tensor=2)),
]


def devices(one: One, table: str, shape: MeshShape) -> Iterator[Parallel]:
    par = one()
    for place in np.ndindex(*shape.sizes().values()):
        mesh = Mesh(shape, par.mesh.device_mesh, dict(zip(MESH_AXES, map(int, place), strict=True)), {})
        yield Parallel(mesh, sharding_rules.load(table), {"batch": 8, "seq": SEQ})


def whole_batch(one: One, cut: int, samples: Any, first: int, size: int, micro: int, workers: int) -> dict[str, np.ndarray]:
    """Put the pieces of all devices together to the global batch."""
    table, shape = CUTS[cut]
    whole = {name: np.full((size, SEQ), -1.0) for name in ("tokens", "targets", "weights", "positions")}
    for par in devices(one, table, shape):
        feed = Feed(lambda i, par=par: host_batch(par, samples, first, BatchShape(size, micro, SEQ), torch.float64), range(1), CPU, workers)
        got = feed(0)
        feed.close()
        rows = got["rows"].flatten().numpy()
        for name, array in whole.items():
            array[np.ix_(rows, got["slots"].numpy())] = got[name].reshape(len(rows), -1).numpy()
    return whole


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([1, 2]),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 500),
    st.integers(0, 9),
)
def test_resumed_elsewhere_the_global_batches_are_the_same(
    one: One, before: int, after: int, micro: int, workers: int, later: int, seed: int, start: int
) -> None:
    """A run that stops after any step goes on with the same samples on another mesh, micro-batch and worker count."""
    lengths = np.random.default_rng(seed).integers(1, 40, 60).tolist()
    reading = Reading(Documents(reset_positions=True, mask_ends=True))
    streams = [Stream(numbered(lengths[k::2]), seed + k, "x", reading) for k in range(2)]
    samples = Blended(Blend([3, 7]), streams)
    sizes = ramp(8, 8, 64, 16)
    step = start + later
    first, size = sizes.before(step), sizes.size(step)
    a = whole_batch(one, before, samples, first, size, 2 // micro, 0)
    b = whole_batch(one, after, Blended(Blend([3, 7]), streams), first, size, micro, workers)
    for name in a:
        assert (a[name] != -1).any() and np.array_equal(a[name], b[name]), name
    assert np.array_equal(a["tokens"], np.stack([samples(first + r, SEQ).tokens for r in range(size)]))
    assert math.isclose(a["weights"].sum(), b["weights"].sum())
