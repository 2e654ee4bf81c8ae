"""Train adapters beside a frozen model on whatever mesh, and compare with one device; count what the graph computes."""

import collections
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import sharding_rules
from mtl import tree
from mtl.axes import LETTERS
from mtl.lora import adapters as lora
from mtl.lora.adapters import Lora
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.params import ParamSpec, count, decayed, init
from mtl.precision import PRECISIONS
from mtl.sharding.parallel import Parallel
from mtl.train.evaluate import in_use, make_logits
from mtl.train.frozen import beside, hold
from mtl.train.gradient import value_and_grad
from mtl.train.loss import make_loss, parse_remat
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.graphs import KINDS
from tests.cases.train import SCHEDULE, batch, parallel
from tests.compare import same
from tests.small import BATCH, MESHES, MODELS

FP64, ADAPTERS = PRECISIONS["fp64"], Lora(3, 6.0)


def place(table: str, world: int, model: str, micros: int = 1, dropout: float = 0.0) -> tuple[Any, Parallel, int]:
    """Lay out a run."""
    config, rules, shape = replace(MODELS[model], dropout_lora=dropout), sharding_rules.load(table), MESHES[table][world]
    micro = BATCH // (math.prod(getattr(shape, axis) for axis in rules.act["batch"]) * micros)
    return config, parallel(config, rules, shape, micro, FP64), micro


def started(specs: Any) -> Any:
    """Let B start at random numbers too, so that the first gradients are not zero."""
    return tree.map(lambda s: s if s.std else ParamSpec(s.shape, s.axes, 0.05), specs)


def train(
    table: str, world: int, model: str, remat: str = "none", how: str = "none", micros: int = 1, dropout: float = 0.0
) -> dict[str, Tensor]:
    """Train three steps in float64: losses, norms and adapters after; the frozen parameters must keep their bits."""
    how, _, more = how.partition("+")
    config, par, micro = place(table, world, model, micros, dropout)
    par = replace(par, piecewise=more == "pieces")
    fns, still = lora.trained(decoder, ADAPTERS), lora.frozen(decoder, ADAPTERS)
    specs = started(fns.specs(config))
    base = init(still.specs(config), par.rules, par.mesh, 7, torch.float64)
    kept = tree.map(lambda x: x.to_local().clone(), base)
    optimizer = adamw(decayed(specs))
    state = init_state(specs, par.rules, par.mesh, 8, FP64, optimizer)
    step = make_step(fns, config, par, optimizer, SCHEDULE, StepOptions(FP64, remat, how, "aot_eager", clip=0.5, seed=3))
    step, found = beside(step, hold(still, config, par, FP64, base)), {}
    for i in range(3):
        state, metrics = step(state, batch(par, config, i, micro, model in ("mistral", "llama_tied")))
        found |= {f"loss.{i}": metrics["loss"], f"norm.{i}": metrics["grad_norm"]}
    assert same(tree.map(lambda x: x.to_local(), base), kept), "a frozen parameter changed"
    held = sum(x.numel() for x in tree.leaves(tree.map(lambda x: x.full_tensor(), state.opt_state)) if x.dim())
    assert held == 2 * count(specs), "optimizer state is that of the adapters"
    return found | {path: p.full_tensor() for path, p in tree.paths(state.params)}


def reference(model: str, path: str, dropout: float = 0.0) -> None:
    """Write what one device gets."""
    save_file({k: v.clone().contiguous() for k, v in train("single", 1, model, dropout=dropout).items()}, path)


def parity(table: str, world: int, model: str, path: str, **how: Any) -> dict[str, Any]:
    """Give the largest relative error against one device."""
    want, got = load_file(Path(path)), train(table, world, model, **how)
    errors = {k: ((got[k] - want[k]).abs().max() / want[k].abs().max()).item() for k in want}
    worst = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    return {"error": errors[worst], "where": worst, "moved": (want["loss.2"] - want["loss.0"]).abs().item()}


def merged(table: str, world: int, model: str) -> dict[str, float]:
    """Compare logits of merged parameters with those of adapters in place, and with those of none."""
    config, par, micro = place(table, world, model)
    fns = lora.whole(decoder, ADAPTERS)
    specs = tree.join(fns.specs(config), started(lora.trained(decoder, ADAPTERS).specs(config)))
    params = init(specs, par.rules, par.mesh, 7, torch.float64)
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, config, 0, micro, False).items()}
    apart = make_logits(fns, config, par, FP64)(params, data)
    plain = make_logits(decoder, config, par, FP64)
    together, without = plain(lora.merge(params), data), plain(tree.join(None, lora.merge(_off(params))), data)
    size = apart.abs().max()
    return {"error": ((together - apart).abs().max() / size).item(), "change": ((without - apart).abs().max() / size).item()}


def dropped() -> dict[str, list[float]]:
    """Give the share that each adapter's inputs lose, the mean of what is left of ones, and how alike two adapters' masks are."""
    config, par, _ = place("single", 1, "llama", dropout=0.3)
    slots = torch.arange(par.sizes["seq"])
    stream = {"rows": torch.arange(4), "slots": slots, "inner_slots": slots, "key": torch.tensor(5)}
    drops = decoder._drops(config, par, stream)
    shapes = {name: [par.sizes[LETTERS[c]] for c in inner] for name, (inner, _) in decoder.PROJECTIONS.items()}
    ones = {name: drop(torch.ones(4, par.sizes["seq"], *shapes[name], dtype=torch.float64)) for name, drop in drops.items()}
    alike = ((ones["query"] == 0) == (ones["key"] == 0)).double().mean().item()
    lost = [(x == 0).double().mean().item() for x in ones.values()]
    return {"lost": lost, "mean": [x.mean().item() for x in ones.values()], "alike": [alike]}


def _off(params: Any) -> Any:
    return tree.map_paths(lambda path, x: x * 0.0 if path.endswith("lora.scale") else x, params)


def counts(table: str, world: int, model: str, remat: str = "none", how: str = "step", adapted: bool = True) -> dict[str, int]:
    """Count operations in the graph of a micro-batch's gradient."""
    config, par, micro = place(table, world, model)
    fns, still = lora.trained(decoder, ADAPTERS), lora.frozen(decoder, ADAPTERS)
    found: collections.Counter[str] = collections.Counter()

    def look(graph: Any, _: Any) -> Any:
        for node in graph.graph.nodes:
            name = str(getattr(node.target, "__name__", "")).split(".")[0]
            found.update(kind for kind, op in KINDS.items() if name == op)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look)
    loss = make_loss(decoder, config, par, FP64, parse_remat(remat), backend if how == "block" else None)
    params = tree.map(lambda x: x.to_local(), init(fns.specs(config), par.rules, par.mesh, 0, torch.float64))
    base = in_use(still, config, par, FP64, init(still.specs(config), par.rules, par.mesh, 0, torch.float64))
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, config, 0, micro, False).items()}
    data |= {"key": torch.tensor(1), "frozen": base}
    value_and_grad(loss, how, backend)(params, data, torch.tensor(1.0, dtype=torch.float64))
    return {kind: found[kind] for kind in KINDS}
