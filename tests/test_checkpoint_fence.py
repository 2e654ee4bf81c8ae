"""Saving beside training, with copies made slow: the next gradient does not wait for them, its update does, and the saved step is whole."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl import checkpoint, tree
from mtl.checkpoint import background
from mtl.checkpoint.background import Saver
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.params import decayed
from mtl.pipeline.schedules import build
from mtl.pipeline.split import split_layers
from mtl.precision import PRECISIONS
from mtl.sharding.shard_map import to_local
from mtl.train.pipelined import Pipeline, make_pipelined_step
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.train import SCHEDULE, batch
from tests.small import LLAMA, SEQ


def slow_copies(monkeypatch: pytest.MonkeyPatch, reached: threading.Event) -> None:
    """Let no copy begin before a step's gradient is computed, and make each take its time after that."""
    real = background.part_of

    def part_of(state: Any) -> Any:
        give = real(state)

        def part(name: str, box: Any) -> torch.Tensor:
            assert reached.wait(60), "the gradient waits for the copies"
            time.sleep(0.01)
            return give(name, box)

        return part

    monkeypatch.setattr(background, "part_of", part_of)


def maker(one: Any, how: str) -> tuple[Callable[[Callable[[], None]], Any], Any, Any]:
    """Give a function from ``before_update`` to a step, a state and a batch."""
    par = one(**decoder.sizes(LLAMA), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), SEQ), batch=1)
    policy, optimizer = PRECISIONS["fp64"], adamw(decayed(decoder.specs(LLAMA)))
    options = StepOptions(policy, compile="none" if how == "pipeline" else how, backend="aot_eager")
    table = build("1f1b", 1, 2)
    pipeline = Pipeline(lambda m: table, split_layers(2, 1, 0, 0), table.place)

    def make(before_update: Callable[[], None]) -> Any:
        chosen = replace(options, before_update=before_update)
        if how == "pipeline":
            return make_pipelined_step(decoder, LLAMA, par, optimizer, SCHEDULE, chosen, pipeline)
        return make_step(decoder, LLAMA, par, optimizer, SCHEDULE, chosen)

    state = init_state(decoder.specs(LLAMA), par.rules, par.mesh, 0, policy, optimizer)
    return make, state, batch(par, LLAMA, 0, 1, False, 2)


@pytest.mark.parametrize(
    ("how", "fenced"),
    [
        *(pytest.param(how, True, id=f"{how}-fenced") for how in ("none", "step", "pipeline")),
        pytest.param("none", False, id="none-left_out"),
        *(pytest.param(how, False, id=f"{how}-left_out", marks=pytest.mark.slow) for how in ("step", "pipeline")),
    ],
)
def test_an_update_waits_for_the_copies_and_a_gradient_does_not(
    how: str, fenced: bool, one: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the fence the update would be in what is saved: the second case shows that the first can fail."""
    reached, saver = threading.Event(), Saver()

    def before_update() -> None:
        reached.set()
        if fenced:
            saver.fence()

    make, state, data = maker(one, how)
    step = make(before_update)
    step(state, data)
    want = tree.map(lambda x: to_local(x).clone(), state)
    slow_copies(monkeypatch, reached)
    reached.clear()
    saver.save(tmp_path / "1", state)
    step(state, data)
    saver.wait()
    found = checkpoint.restore(tmp_path / "1", tree.map(lambda x: torch.empty_like(x, device="meta"), want))
    same = [a.equal(b) for a, b in zip(tree.leaves(found), tree.leaves(want), strict=True)]
    assert all(same) if fenced else not all(same)
    assert not any(x.equal(to_local(y)) for x, y in zip(tree.leaves(want.params), tree.leaves(state.params), strict=True))


def test_a_fence_with_no_save_under_way_costs_nothing() -> None:
    saver = Saver()
    begun = time.perf_counter()
    for _ in range(1000):
        saver.fence()
    assert time.perf_counter() - begun < 0.1
