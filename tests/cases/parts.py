"""Steps whose gradients stay apart by layer, and steps that stack them: the same bits, and what is copied."""

from collections import Counter
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import sharding_rules
from mtl import tree
from mtl.models import decoder
from mtl.optim.optimizers import adamw, sgd
from mtl.params import decayed
from mtl.precision import PRECISIONS
from mtl.sharding.shard_map import to_local
from mtl.train import gradient
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.train import SCHEDULE, batch, parallel
from tests.small import BATCH, MESHES, MODELS


def run(
    table: str, world: int, model: str, optimizer: str, least: int, micros: int = 1, clip: float = 0.0
) -> tuple[list[torch.Tensor], list[Counter[str]]]:
    """Take three steps. Gives losses and state, and the operations of every graph that was compiled."""
    config, rules, shape, precision = (
        MODELS[model],
        sharding_rules.load(table),
        MESHES[table][world],
        PRECISIONS["fp64" if clip else "fp32"],
    )
    micro = BATCH // world // micros
    par, specs = parallel(config, rules, shape, micro, precision), decoder.specs(config)
    update = sgd(decayed(specs)) if optimizer == "sgd" else adamw(decayed(specs), impl=optimizer)
    state = init_state(specs, rules, par.mesh, 7, precision, update)
    graphs: list[Counter[str]] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    usual, gradient.LEAST = gradient.LEAST, least
    options = StepOptions(precision, "none", "step", aot_autograd(fw_compiler=count), clip=clip)
    step = make_step(decoder, config, par, update, SCHEDULE, options)
    gradient.LEAST = usual
    losses: list[torch.Tensor] = []
    for i in range(3):
        state, metrics = step(state, batch(par, config, i, micro, False, dtype=precision.param))
        losses += [metrics["loss"].clone(), metrics["good"].clone()]
        if clip:
            assert metrics["grad_norm"] > 2 * clip
            losses.append(metrics["grad_norm"].clone())
    return [*losses, *(to_local(x).clone() for x in tree.leaves(state))], graphs


def same(table: str, world: int, model: str, optimizer: str, **more: Any) -> dict[str, Any]:
    """Compare both: bits, and how often arrays are put together in each one's largest graph, the gradient's."""
    apart, graphs = run(table, world, model, optimizer, 1, **more)
    whole, graphs_of_whole = run(table, world, model, optimizer, 1 << 60, **more)
    stacks = [max(found, key=Counter.total)["aten.stack.default"] for found in (graphs, graphs_of_whole)]
    errors = [
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(apart, whole, strict=True) if b.is_floating_point()
    ]
    return {"error": max(errors), "same": len(apart) == len(whole) and all(map(torch.equal, apart, whole)), "stacks": stacks}
