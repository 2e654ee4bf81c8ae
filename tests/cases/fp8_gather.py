"""Gradients and steps whose weights are gathered in 8 bits, beside the same with gathers in 16."""

import dataclasses
import importlib
import math
from collections import Counter
from functools import partial
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import sharding_rules
from experiments.resting import Rest
from mtl import tree
from mtl.kernels import fp8
from mtl.lora.adapters import Lora, frozen, trained
from mtl.models import decoder
from mtl.ops.scales import weight_scales
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.params import decayed, init
from mtl.precision import PRECISIONS
from mtl.runtime.overlap import GATHERS, overlap
from mtl.sharding.shard_map import to_local
from mtl.train import evaluate as evaluating
from mtl.train import step as stepping
from mtl.train.evaluate import make_evaluate
from mtl.train.frozen import beside, hold
from mtl.train.gradient import value_and_grad
from mtl.train.loss import make_loss, parse_remat
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.fp8 import CONFIG, SEQ
from tests.cases.overlap import measure
from tests.cases.train import batch, parallel
from tests.small import MESHES

ROWS = 8
POLICY = PRECISIONS["fp8"]


class Traffic(TorchDispatchMode):
    """Counts collectives, the bytes that gathers give, and the weights that are rounded where they rest."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()
        self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        self.times[name if name != "all_reduce" else f"all_reduce {args[1]}"] += 1
        self.gathered += out.nbytes if str(func) in GATHERS else 0
        return out

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def place(table: str, world: int, engine: bool = False, precision: str = "fp8", micros: int = 1) -> Any:
    """Lay out a run."""
    rules, shape = sharding_rules.load(table), MESHES[table][world]
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    par = parallel(CONFIG, rules, shape, ROWS // rows // micros, PRECISIONS[precision], seq=SEQ)
    return dataclasses.replace(par, fp8=PRECISIONS[precision].fp8, engine=engine)


def data_for(par: Any, micros: int = 1) -> Any:
    """Make a batch for this device."""
    rows = math.prod(getattr(par.mesh.shape, axis) for axis in par.rules.act["batch"])
    return batch(par, CONFIG, 0, ROWS // rows // micros, False, ROWS, torch.float32)


def weights(par: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Draw local weights that differ much in size, from layer to layer and from one device's part to the next's."""
    params = tree.map(to_local, init(decoder.specs(CONFIG), par.rules, par.mesh, 3, torch.float32))
    params["layers"] = tree.map(lambda p: p * torch.linspace(0.5, 4, p.shape[0]).view(-1, *[1] * (p.dim() - 1)), params["layers"])
    return tree.map(lambda p: p * (1 + par.mesh.index(par.mesh.shape.active()) if p.dim() > 2 else 1), params)


def gradients(table: str, world: int, remat: str = "none", how: str = "none", engine: bool = False, backend: str = "aot_eager") -> Any:
    """Take a gradient with gathers in 8 bits and one in 16: are all bits equal, and what does each send?"""
    par = place(table, world, engine)
    params = weights(par)
    data = {k: v if k == "slots" else v[0] for k, v in data_for(par).items()} | {"key": torch.tensor(1)}
    results: list[Any] = []
    found: list[Any] = []
    for early in (True, False):
        loss = make_loss(decoder, CONFIG, par, POLICY, parse_remat(remat), backend if how == "block" else None)
        gradient = value_and_grad(loss, how, backend)
        given = dict(data)
        with torch.no_grad(), Traffic() as before:
            if early:
                given["scales"] = weight_scales(par, decoder.projections(CONFIG), params["layers"], POLICY.compute)
        with Traffic() as traffic, torch.no_grad():
            results.append(tree.leaves(gradient(params, given, torch.tensor(1.0))))
        found.append({"times": dict(traffic.times), "before": dict(before.times), "gathered": traffic.gathered})
    same = [torch.equal(a, b) for a, b in zip(*results, strict=True)]
    nonzero = all(bool(x.count_nonzero()) for x in results[0])
    return {"same": all(same) and len(same) > 9, "nonzero": nonzero, "eight": found[0], "sixteen": found[1]}


def without(fn: Any) -> Any:
    """Run a function whose steps and evaluations find no scales ahead."""
    usual, stepping.weight_scales = stepping.weight_scales, lambda *_: {}
    try:
        return fn()
    finally:
        stepping.weight_scales = usual


def steps(table: str, world: int, micros: int = 1, tuned: bool = False, offload: str = "none", precision: str = "fp8") -> Any:
    """Take three steps both ways; with ``tuned`` of adapters beside frozen weights. Are losses and state equal, what did a step send?"""

    policy = PRECISIONS[precision]

    def run() -> Any:
        par = place(table, world, precision=precision, micros=micros)
        lora = Lora(4)
        model: Any = trained(decoder, lora) if tuned else decoder
        optimizer = adamw(decayed(model.specs(CONFIG)))
        state = Rest(offload, model.specs(CONFIG), par.mesh, policy).fresh(partial(init_state, seed=1), par.rules, optimizer)
        step = make_step(model, CONFIG, par, optimizer, schedule("constant", 1e-2, 100, 3), StepOptions(policy, offload=offload))
        if tuned:
            still = frozen(decoder, lora)
            step = beside(step, hold(still, CONFIG, par, policy, init(still.specs(CONFIG), par.rules, par.mesh, 3, torch.float32)))
        numbers: list[Tensor] = []
        for _ in range(3):
            with Traffic() as traffic:
                state, metrics = step(state, data_for(par, micros))
            numbers += [metrics["loss"], metrics["grad_norm"]]
        return [*numbers, *map(to_local, tree.leaves(state))], traffic

    eight, sixteen = run(), without(run)
    return {
        "same": all(torch.equal(a, b) for a, b in zip(eight[0], sixteen[0], strict=True)),
        "eight": {"times": dict(eight[1].times), "gathered": eight[1].gathered},
        "sixteen": {"times": dict(sixteen[1].times), "gathered": sixteen[1].gathered},
    }


def graph(table: str, world: int, remat: str = "none", engine: bool = False) -> Any:
    """Look at the compiled step: what its gathers give, and how many start before a product that runs before they are waited for."""
    par = place(table, world, engine)
    params = weights(par)
    data = {k: v if k == "slots" else v[0] for k, v in data_for(par).items()} | {"key": torch.tensor(1)}
    found: list[Any] = []

    def look(module: Any, _: Any) -> Any:
        overlap(module.graph)
        module.recompile()
        nodes = list(module.graph.nodes)
        gathers = [n for n in nodes if str(n.target) in GATHERS]
        sizes: Counter[str] = Counter()
        for node in gathers:
            value = node.meta["val"]
            sizes["bytes"] += value.numel() * value.element_size()
            sizes["elements"] += value.numel()
            sizes[f"of {value.element_size()}"] += 1
        found.append({**sizes, **measure(nodes), "reduced": sum("all_reduce" in str(n.target) for n in nodes)})
        return make_boxed_func(module.forward)

    results: list[Any] = []
    for early in (True, False):
        loss = make_loss(decoder, CONFIG, par, POLICY, parse_remat(remat))
        with torch.no_grad():
            scales = weight_scales(par, decoder.projections(CONFIG), params["layers"], POLICY.compute) if early else {}
            step = value_and_grad(loss, "step", aot_autograd(fw_compiler=look))
            results.append(tree.leaves(step(params, data | {"scales": scales}, torch.tensor(1.0))))
    return {"eight": found[0], "sixteen": found[1], "same": all(torch.equal(a, b) for a, b in zip(*results, strict=True))}


def entropy(table: str, world: int) -> Any:
    """Evaluate both ways."""
    par = place(table, world)
    params = init(decoder.specs(CONFIG), par.rules, par.mesh, 3, torch.float32)
    evaluate = make_evaluate(decoder, CONFIG, par, POLICY)
    with Traffic() as eight:
        first = evaluate(params, [data_for(par)] * 2)
    usual, evaluating.weight_scales = evaluating.weight_scales, lambda *_: {}
    with Traffic() as sixteen:
        second = evaluate(params, [data_for(par)] * 2)
    evaluating.weight_scales = usual
    return {"same": first == second, "gathered": [eight.gathered, sixteen.gathered]}


def kernels(device: str) -> None:
    """Hold the kernels against the plain reference; under the interpreter on values that 8 bits hold."""
    kernel = importlib.import_module("mtl.kernels.fp8_triton")
    for rows, columns in ((16, 16), (48, 80), (144, 400), (256, 144)):
        draw = torch.Generator().manual_seed(rows + columns)
        x = torch.randn(rows, columns, generator=draw) * torch.randn(rows, 1, generator=draw).exp()
        if device == "cpu":
            x = x.sign() * 2.0 ** torch.randint(-3, 4, (rows, columns), generator=draw)
        x, scale = x.to(device), torch.tensor([2.0, 16.0], device=device)[1]
        for given in (x, x.bfloat16(), x.t().contiguous().t(), torch.cat([x, x], 1)[:, columns:]):
            for through in (torch.bfloat16, torch.float32):
                out = torch.zeros(rows, columns + 7, dtype=fp8.VALUES, device=device)
                again = torch.zeros(rows, columns + 3, dtype=fp8.VALUES, device=device)
                kernel.lay(given, scale, through, out[:, 5:-2], again[:, :-3])
                want = fp8.plain(given.to(through), scale, scale, fp8.VALUES)
                assert torch.equal(out[:, 5:-2].view(torch.uint8), want[0].view(torch.uint8)), (rows, columns, through)
                assert torch.equal(again[:, :-3].view(torch.uint8), want[0].view(torch.uint8)) and not again[:, -3:].view(torch.uint8).any()
                assert not out[:, :5].view(torch.uint8).any() and not out[:, -2:].view(torch.uint8).any(), "and nothing beside it"
                assert torch.equal(kernel.turned(out[:, 5:-2]).view(torch.uint8), want[1].view(torch.uint8))
