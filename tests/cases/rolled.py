"""Take the gradient of an FSDP step with its layers as pieces, and as one graph, and compare what comes out."""

import copy
import dataclasses
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

import sharding_rules
from mtl import tree
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.runtime import overlap
from mtl.runtime.rolled import roll
from mtl.sharding.shard_map import to_local
from mtl.train.gradient import value_and_grad
from mtl.train.loss import Loss, make_loss, parse_remat
from tests.cases.train import batch, parallel
from tests.small import BATCH, MESHES, MODELS

LAYERS = 7


def traced(model: str, precision: str, engine: bool, remat: str) -> dict[str, Any]:
    """Run the graph whole and in pieces, operation by operation: how often each piece is called, nodes, and whether bits are the same."""
    loss, arguments = _step(model, precision, engine, remat)
    found: dict[str, Any] = {}

    def look(graph: Any, _: Any) -> Any:
        overlap.overlap(graph.graph)
        whole = GraphModule(graph, copy.deepcopy(graph.graph))
        found["called"] = roll(graph.graph)
        found["nodes"] = [len(g.graph.nodes) for g in (whole, graph)]
        graph.recompile()

        def both(*inputs: Any) -> Any:
            results = [tree.leaves(g(*inputs)) for g in (whole, graph)]
            found["same"] = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            return results[0]

        return make_boxed_func(both)

    value_and_grad(loss, "step", aot_autograd(fw_compiler=look))(*arguments)
    return found


def compiled(model: str, precision: str, engine: bool, remat: str) -> dict[str, Any]:
    """Compile both with inductor, as a step over GPUs is: how often each piece is called, and whether bits are the same."""
    loss, arguments = _step(model, precision, engine, remat)
    called: list[list[int]] = []
    results: list[Any] = []

    def counted(graph: Any) -> list[int]:
        called.append(roll(graph))
        return called[-1]

    for how in (lambda _: [], counted):  # pyright: ignore
        overlap.roll = how
        options = {"emulate_precision_casts": True, "reorder_for_locality": False, **overlap.options()}
        with torch._inductor.config.patch(force_disable_caches=True):
            results.append(tree.leaves(value_and_grad(loss, "step", "inductor", options)(*arguments)))
    overlap.roll = roll
    return {"called": called[0], "same": all(torch.equal(a, b) for a, b in zip(*results, strict=True))}


def _step(name: str, precision: str, engine: bool, remat: str) -> tuple[Loss, tuple[Any, ...]]:
    model = dataclasses.replace(MODELS[name], layers=LAYERS, vocab=500)  # more rows than a device has tokens: these are exchanged
    par = parallel(model, sharding_rules.load("fsdp"), MESHES["fsdp"][2], BATCH // 2, PRECISIONS[precision])
    par = dataclasses.replace(par, engine=engine)
    loss = make_loss(decoder, model, par, PRECISIONS[precision], parse_remat(remat))
    params = tree.map(to_local, init(decoder.specs(model), par.rules, par.mesh, 0, PRECISIONS[precision].param))
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, model, 0, BATCH // 2, False).items()}
    data["key"] = torch.tensor(1)
    return loss, (params, data, torch.tensor(1.0, dtype=PRECISIONS[precision].param))
