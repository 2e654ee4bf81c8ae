"""Count what is in the captured graph of a step's gradient, and what a rank's memory holds."""

import collections
import math
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import sharding_rules
from mtl import tree
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.sharding.shard_map import to_local
from mtl.train.gradient import gather_weights, value_and_grad
from mtl.train.loss import make_loss, parse_remat
from tests.cases.train import batch, parallel
from tests.small import BATCH, MESHES, MODELS

KINDS = {
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all_single",
    "mm": "mm",
    "core": "_scaled_dot_product_flash_attention_for_cpu",
    "activation": "silu",
}


def counts(table: str, world: int, model: str = "llama", remat: str = "none", how: str = "step", pieces: int = 1) -> dict[str, Any]:
    """Count operations by kind over all graphs, and the elements that the largest gathered weight holds."""
    config, rules, shape, precision = MODELS[model], sharding_rules.load(table), MESHES[table][world], PRECISIONS["fp64"]
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    par = parallel(config, rules, shape, BATCH // rows, precision)
    specs = decoder.specs(config)
    found: collections.Counter[str] = collections.Counter()
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        for node in graph.graph.nodes:
            name = str(getattr(node.target, "__name__", "")).split(".")[0]
            found.update(kind for kind, op in KINDS.items() if name == op)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count)
    loss = make_loss(decoder, config, par, precision, parse_remat(remat), backend if how == "block" else None)
    params = tree.map(to_local, init(specs, rules, par.mesh, 0, precision.param))
    params = gather_weights(par, tree.map(lambda s: s.axes, specs), params, precision.compute)
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, config, 0, BATCH // rows, False).items()}
    data["key"] = torch.tensor(1)
    usual, decoder.MLP_BYTES = decoder.MLP_BYTES, 16 * BATCH // rows * par.sizes["seq"] * config.mlp // pieces
    value_and_grad(loss, how, backend)(params, data, torch.tensor(1.0, dtype=torch.float64))
    decoder.MLP_BYTES = usual
    return {**{kind: found[kind] for kind in KINDS}, "graphs": graphs}
