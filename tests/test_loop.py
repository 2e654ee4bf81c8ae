"""The loop that tells of a step while the next one's gradient is under way: the same states and records, in another order."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from experiments import watching
from experiments.presets import PRESETS
from mtl import tree
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.params import decayed
from mtl.precision import PRECISIONS
from mtl.runtime.process import Place
from mtl.runtime.profile import profiled_steps
from mtl.sharding.mesh import MeshShape
from mtl.sharding.shard_map import to_local
from mtl.train.loop import Behind, TrainingStopped, fit
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.train import batch
from tests.compare import same
from tests.small import MODELS

STEPS = 5
Told = list[tuple[int, dict[str, Any], list[Tensor]]]


class Noted:
    """The decoder, which notes when a micro-batch begins; one of them fails."""

    def __init__(self, events: list[str], fails: int) -> None:
        self.events, self.fails = events, fails

    def __getattr__(self, name: str) -> Any:
        return getattr(decoder, name)

    def embed(self, *args: Any) -> Any:
        """Embed, as the decoder does."""
        self.events.append("micro")
        if self.events.count("micro") == self.fails:
            raise MemoryError("no room for a gradient")
        return decoder.embed(*args)


def trained(
    one: Any, may_wait: Callable[[int], bool], events: list[str], broken: int | None = None, micros: int = 1, fails: int = 0
) -> tuple[Told, Any]:
    """Train, and give what a hook saw of each step; ``events`` notes micro-batches, updates and hooks in their order."""
    cfg, policy = MODELS["llama"], PRECISIONS["fp64"]
    par = one(**decoder.sizes(cfg), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), 8), batch=2)
    optimizer, behind = adamw(decayed(decoder.specs(cfg))), Behind(may_wait)

    options = StepOptions(policy, before_update=lambda: events.append("update"), under_way=behind.settle)
    step = make_step(cast(Any, Noted(events, fails)), cfg, par, optimizer, schedule("constant", 1e-2, 9), options)
    state = init_state(decoder.specs(cfg), par.rules, par.mesh, 0, policy, optimizer)
    told: Told = []

    def hook(i: int, state: Any, record: dict[str, Any]) -> None:
        events.append(f"told {i}")
        assert record.pop("step_time") > 0
        told.append((i, record, [to_local(x).clone() for x in tree.leaves(state)]))

    def batch_at(i: int) -> Any:
        data = batch(par, cfg, i, 2, False, size=2 * micros)
        if i == broken:
            data["weights"][0, 0, 3] = float("nan")
        return data

    try:
        fit(state, step, batch_at, range(STEPS), [hook], behind)
    except (TrainingStopped, MemoryError) as stopped:
        return told, (stopped, [to_local(x).clone() for x in tree.leaves(state)])
    return told, None


def test_hooks_see_each_step_as_it_was(one: Any) -> None:
    events: list[str] = []
    want, _ = trained(one, lambda i: False, events)
    assert events[:4] == ["micro", "update", "told 1", "micro"]
    events.clear()
    got, _ = trained(one, lambda i: i != 3, events)
    assert same([x[2] for x in got], [x[2] for x in want]) and [x[:2] for x in got] == [x[:2] for x in want]
    one_two = ["micro", "update", "micro", "told 1", "update", "micro", "told 2", "update", "told 3"]
    assert events == [*one_two, "micro", "update", "micro", "told 4", "update", "told 5"]


def test_a_step_is_told_of_when_the_first_micro_batch_of_the_next_is_under_way(one: Any) -> None:
    """Not the last: a device is told few kernels ahead, so that one would be told of a whole step late, and a signal heard so."""
    events: list[str] = []
    want, _ = trained(one, lambda i: False, events, micros=3)
    events.clear()
    got, _ = trained(one, lambda i: i != 2, events, micros=3)
    assert same([x[2] for x in got], [x[2] for x in want]) and [x[:2] for x in got] == [x[:2] for x in want]
    rest = ["micro", "micro", "update"]
    begin = ["micro", *rest, "micro", "told 1", *rest, "told 2"]
    assert events == [*begin, "micro", *rest, "micro", "told 3", *rest, "micro", "told 4", *rest, "told 5"]


def test_a_step_is_told_of_although_the_next_one_s_gradient_fails(one: Any) -> None:
    events: list[str] = []
    told, (stopped, state) = trained(one, lambda i: True, events, fails=4)
    assert isinstance(stopped, MemoryError) and events.count("update") == 3
    assert [x[0] for x in told] == [1, 2, 3] and same(state, told[-1][2])


def test_a_step_that_fails_stops_the_run_before_the_next_update(one: Any) -> None:
    events: list[str] = []
    told, (stopped, state) = trained(one, lambda i: True, events, broken=2)
    assert "step 3: the loss of micro-batch 0 is nan. The state after step 2 is untouched" in str(stopped)
    assert [x[0] for x in told] == [1, 2] and same(state, told[-1][2])
    assert (events.count("micro"), events.count("update")) == (4, 3), "the gradient of step 4 was taken, and is not used"


def test_each_step_has_its_own_time() -> None:
    """What a hook takes is not the next step's; what the next batch takes is."""
    times: list[float] = []

    def slow_step(state: Any, batch: Any) -> Any:
        time.sleep(0.05)
        return state, {"loss": torch.tensor(1.0), "good": torch.tensor(True), "losses": torch.ones(1)}

    def hook(i: int, state: Any, record: dict[str, Any]) -> None:
        times.append(record["step_time"])
        time.sleep(0.2 if i == 2 else 0.0)

    fit(None, slow_step, lambda i: time.sleep(0.2 if i == 1 else 0.0), range(4), [hook])
    assert times[0] >= 0.25 and all(0.05 <= seconds < 0.2 for seconds in times[1:]), times


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_s_steps_are_timed_by_its_own_clock() -> None:
    """What waits to be told of is told late; each step still has the device's time, also the last, which is told of at once."""
    times, told, behind = list[float](), list[int](), Behind(lambda i: True)
    x = torch.ones(1, device="cuda")

    def step(state: Any, batch: Any) -> Any:
        torch.cuda._sleep(200_000_000)  # pyright: ignore[reportPrivateUsage] - some 0.1 s
        told.append(len(times))
        behind.settle()
        return state, {"loss": x.sum(), "good": x[0] > 0, "losses": x * 2}

    fit(None, step, lambda i: None, range(5), [lambda i, state, record: times.append(record["step_time"])], behind)
    assert told == [0, 0, 1, 2, 3], "a step is told of when the next one's work is under way"
    assert max(times[1:]) < 1.6 * min(times[1:]), times


def test_steps_that_need_the_device_are_told_of_at_once() -> None:
    setup, place, shape = PRESETS["tiny"], Place(0, 1, 0, torch.device("cuda")), MeshShape(fsdp=1)
    setup = replace(setup, train=replace(setup.train, steps=40, eval_every=10), checkpoint=replace(setup.checkpoint, every=7))
    free = [i for i in range(11, 31) if watching.may_wait(setup, place, shape, 10, i)]
    assert free == [i for i in range(12, 31) if i not in (14, 20, 21, 28, 30)], "the first two compile; then all but these"
    begin, end = profiled_steps(10, 40, 3)
    assert (begin, end) == (13, 16)
    assert [i for i in free if not watching.may_wait(replace(setup, profile=3), place, shape, 10, i)] == [13, 16]
    assert not watching.may_wait(setup, replace(place, device=torch.device("cpu")), shape, 10, 12)
    assert not watching.may_wait(setup, place, MeshShape(pipe=2), 10, 12)
