"""Optimizers against torch's, schedules at their corners, and steps that must not happen."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl import tree
from mtl.errors import UserError
from mtl.models import decoder
from mtl.optim.optimizers import adamw, sgd
from mtl.optim.schedules import SCHEDULES, schedule
from mtl.optim.transforms import Optimizer, clip, sum_of_squares
from mtl.params import decayed
from mtl.precision import PRECISIONS
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train.state import FIRST_SCALE, SCALE_PATIENCE, init_state, next_scale
from mtl.train.step import StepOptions, make_step
from tests.cases.train import batch
from tests.compare import close, same
from tests.small import MODELS

One = Callable[..., Parallel]
MASK = {"matrix": {"weight": True, "bias": False}, "more": [True]}
RATES = [0.1, 0.03, 1e-3, 0.2, 0.07]  # none of them is a float32


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Any:
    """Make a parameter tree of random numbers, shaped like MASK."""
    rng = torch.Generator().manual_seed(seed)
    weight, bias, more = (torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in ((4, 6), (6,), (3, 2, 2)))
    return {"matrix": {"weight": weight, "bias": bias}, "more": [more]}


def run(optimizers: list[Optimizer], dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Take one step with each optimizer in turn, from one state."""
    params = draw(0, dtype)
    state = optimizers[0].init(params)
    for i, optimizer in enumerate(optimizers):
        params, state = optimizer.update(draw(1 + i, dtype), state, params, torch.tensor(RATES[i], dtype=torch.float64), torch.tensor(True))
    return params, state


def run_torch(make: Callable[[Any], torch.optim.Optimizer], decay: float) -> Any:
    """Do the same with an optimizer of torch's; weight decay by parameter groups."""
    params = draw(0)
    leaves = [x.requires_grad_() for x in tree.leaves(params)]
    groups = [{"params": [x], "weight_decay": decay if yes else 0.0} for x, yes in zip(leaves, tree.leaves(MASK), strict=True)]
    optimizer = make(groups)
    for i, rate in enumerate(RATES):
        for x, g in zip(leaves, tree.leaves(draw(1 + i)), strict=True):
            x.grad = g
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return tree.map(Tensor.detach, params)


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_is_torchs(impl: str, decay: float) -> None:
    got, state = run([adamw(MASK, 0.8, 0.9, 1e-3, decay, impl)] * 5)
    close(got, run_torch(lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-3), decay))
    assert state[0]["count"].item() == 5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_fused_adamw_is_the_plain_one(dtype: torch.dtype, bound: float) -> None:
    plain, fused = (adamw(MASK, 0.9, 0.95, 1e-8, 0.3, impl) for impl in ("plain", "fused"))
    want = run([plain] * 5, dtype)
    close(run([fused] * 5, dtype), want, bound)
    close(run([plain, fused, fused, plain, fused], dtype), want, bound)  # the state is one and the same


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_sgd_is_torchs(momentum: float, nesterov: bool, decay: float) -> None:
    got, _ = run([sgd(MASK, momentum, nesterov, decay)] * 5)
    close(got, run_torch(lambda groups: torch.optim.SGD(groups, 0.1, momentum=momentum, nesterov=nesterov), decay))


def test_unknown_impl() -> None:
    with pytest.raises(UserError, match="Did you mean 'fused'"):
        adamw(MASK, impl="fusd")


@pytest.mark.parametrize("limit", [0.5, 3.0, 1e6])
def test_clip_is_torchs(limit: float) -> None:
    grads = draw(0)
    leaves = [x.clone().requires_grad_() for x in tree.leaves(grads)]
    for x in leaves:
        x.grad = x.detach().clone()
    norm = sum_of_squares(tree.leaves(grads), [1] * 3).sqrt()
    close(norm, torch.nn.utils.clip_grad_norm_(leaves, limit))
    got = clip(grads, norm, limit)
    close(tree.leaves(got), [x.grad for x in leaves])
    assert same(got, grads) == (limit > norm)
    assert clip(grads, norm, 0.0) is grads


def test_the_norm_counts_every_copy_once() -> None:
    whole = draw(0)
    shared = sum_of_squares(tree.leaves(whole) * 4, [4, 4, 4] * 4)
    close(shared, sum_of_squares(tree.leaves(whole), [1] * 3))
    short = [torch.full((1000,), 300.0, dtype=torch.bfloat16)]
    assert sum_of_squares(short, [1]).item() == 9e7, "summed in float32"


@pytest.mark.parametrize("model", MODELS)
def test_matrices_decay_and_norms_and_biases_do_not(model: str) -> None:
    mask = dict(tree.paths(decayed(decoder.specs(MODELS[model]))))
    assert mask == {path: path.endswith(".weight") and "norm" not in path for path in mask}
    assert mask["embed.weight"] and mask["layers.query.weight"] and mask["layers.down.weight"]
    assert mask["layers.norm1.weight"] is False and mask["norm.weight"] is False
    if model == "gpt":
        assert mask["positions.weight"] and not any(mask[f"layers.{name}.bias"] for name in ("query", "key", "value", "out", "up", "down"))


@pytest.mark.parametrize("make", [adamw, lambda mask, **rest: adamw(mask, impl="fused", **rest), sgd])
def test_decay_moves_what_the_mask_says(make: Any) -> None:
    params = draw(0)
    optimizer = make(MASK, weight_decay=0.25)
    zero, rate = tree.map(torch.zeros_like, params), torch.tensor(0.5, dtype=torch.float64)
    got, _ = optimizer.update(zero, optimizer.init(params), tree.map(torch.clone, params), rate, torch.tensor(True))
    close(got["matrix"]["weight"], params["matrix"]["weight"] * 0.875)
    close(got["more"], [params["more"][0] * 0.875])
    assert same(got["matrix"]["bias"], params["matrix"]["bias"])


# ---------------------------------------------------------------- steps that must not happen


@pytest.mark.parametrize(
    "make", [adamw, lambda mask: adamw(mask, impl="fused"), sgd, lambda mask: sgd(mask, nesterov=True, weight_decay=0.1)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_step_that_is_not_good_changes_nothing(make: Any, bad: float) -> None:
    optimizer, rate = make(MASK), torch.tensor(0.1, dtype=torch.float64)
    params = draw(0)
    params, state = optimizer.update(draw(1), optimizer.init(params), params, rate, torch.tensor(True))
    before = tree.map(torch.clone, (params, state))
    after = optimizer.update(tree.map(lambda g: g * bad, draw(2)), state, params, rate, torch.tensor(False))
    assert same(after, before)
    after = optimizer.update(draw(2), after[1], after[0], rate, torch.tensor(True))
    assert not any(same(a, b) for a, b in zip(tree.leaves(after[0]), tree.leaves(before[0]), strict=True))


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_a_whole_step_with_a_nan_changes_nothing(one: One, impl: str) -> None:
    config, precision = MODELS["llama"], PRECISIONS["fp64"]
    specs = decoder.specs(config)
    par = one(**decoder.sizes(config), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), 8), batch=2)
    optimizer = adamw(decayed(specs), impl=impl)
    state = init_state(specs, par.rules, par.mesh, 0, precision, optimizer)
    step = make_step(decoder, config, par, optimizer, schedule("constant", 0.1, 10), StepOptions(precision))
    broken = batch(par, config, 1, 2, False, size=4)
    broken["weights"][1, 0, 3] = float("nan")
    for i, data in enumerate((batch(par, config, 0, 2, False, size=4), broken, batch(par, config, 2, 2, False, size=4))):
        before = tree.map(lambda x: to_local(x).clone(), state)
        state, metrics = step(state, data)
        now = tree.map(to_local, state)
        assert bool(metrics["good"]) == (i != 1)
        assert same(now, before) == (i == 1)
        moved = [not same(a, b) for a, b in zip(tree.leaves(now), tree.leaves(before), strict=True)]
        assert all(moved) == (i != 1), "a good step changes every leaf"
    assert now.step.item() == 2


def test_loss_scale_halves_and_doubles() -> None:
    good, bad = torch.tensor(True), torch.tensor(False)
    state = {"scale": torch.tensor(FIRST_SCALE), "good_steps": torch.tensor(0.0)}
    for i in range(SCALE_PATIENCE - 1):
        state = next_scale(state, good)
        assert (state["scale"].item(), state["good_steps"].item()) == (FIRST_SCALE, i + 1)
    doubled = next_scale(state, good)
    assert (doubled["scale"].item(), doubled["good_steps"].item()) == (2 * FIRST_SCALE, 0)
    halved = next_scale(state, bad)
    assert (halved["scale"].item(), halved["good_steps"].item()) == (FIRST_SCALE / 2, 0), "patience starts again"
    for _ in range(40):
        halved = next_scale(halved, bad)
    assert halved["scale"].item() == 1.0, "never below 1"


# ---------------------------------------------------------------- schedules

PEAK, STEPS, WARMUP, FLOOR = 0.3, 110, 10, 0.1


def at(name: str, *steps: int, **other: Any) -> list[float]:
    rate = schedule(name, PEAK, **{"steps": STEPS, "warmup": WARMUP, "floor": FLOOR, **other})
    values = [rate(torch.tensor(step)) for step in steps]
    assert all(v.dtype == torch.float64 and v.dim() == 0 for v in values)
    return [v.item() / PEAK for v in values]


def exactly(*values: float) -> Any:
    return pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_to_the_peak(name: str) -> None:
    assert at(name, *range(WARMUP)) == exactly(*((i + 1) / WARMUP for i in range(WARMUP)))
    assert at(name, WARMUP) == exactly(1.0)
    assert at(name, 0, warmup=0) == exactly(1.0)
    assert at(name, 0, warmup=1) == exactly(1.0)
    rates = at(name, *range(WARMUP, STEPS + 20))
    assert all(a >= b for a, b in itertools.pairwise(rates)), "and never rise again"


def test_what_each_schedule_does_after_warmup() -> None:
    assert at("constant", 60, STEPS, 10**6) == exactly(1.0, 1.0, 1.0)
    assert at("linear", 60, 85, STEPS, 10**6) == exactly(0.55, 0.325, FLOOR, FLOOR)
    third = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi / 4)) / 2
    assert at("cosine", 35, 60, STEPS, 10**6) == exactly(third, 0.55, FLOOR, FLOOR)
    assert at("wsd", 11, 60, 90, 100, STEPS, 10**6) == exactly(1.0, 1.0, 1.0, 0.55, FLOOR, FLOOR)
    assert at("inverse_sqrt", 40, 90, 160, 10**6) == exactly(0.5, 1 / 3, 0.25, FLOOR)
    assert at("inverse_sqrt", 0, 1, 4, warmup=0) == exactly(1.0, 1.0, 0.5)
    assert at("cosine", STEPS, floor=0.0)[0] == pytest.approx(0.0, abs=1e-15)
    assert at("linear", STEPS, floor=0.0) == [0.0]


def test_schedules_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"unknown --optim.schedule 'cosin'\. Did you mean 'cosine'"):
        schedule("cosin", PEAK, STEPS)
    for wrong in ({"warmup": -1}, {"floor": 1.5}, {"floor": -0.1}, {"peak": -1.0}):
        with pytest.raises(UserError, match="must not be negative"):
            schedule(**{"name": "cosine", "peak": PEAK, "steps": STEPS, **wrong})
