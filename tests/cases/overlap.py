"""Run the overlap pass on the real graph of an FSDP step and look at what lies between a collective's start and its wait."""

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
from mtl.runtime.overlap import ENDS, GATHERS, SUMS, overlap
from mtl.sharding.shard_map import to_local
from mtl.train.gradient import value_and_grad
from mtl.train.loss import make_loss, parse_remat
from tests.cases.train import batch, parallel
from tests.small import BATCH, LLAMA, MESHES


def distances(precision: str, engine: bool) -> dict[str, Any]:
    """Give, before and after, the share of gathers and sums that a product overlaps, and whether results are equal."""
    model = dataclasses.replace(LLAMA, vocab=500)  # more rows than a device has tokens: these are exchanged
    par = parallel(model, sharding_rules.load("fsdp"), MESHES["fsdp"][2], BATCH // 2, PRECISIONS[precision])
    par = dataclasses.replace(par, engine=engine)
    loss = make_loss(decoder, model, par, PRECISIONS[precision], parse_remat("none"))
    params = tree.map(to_local, init(decoder.specs(model), par.rules, par.mesh, 0, PRECISIONS[precision].param))
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, model, 0, BATCH // 2, False).items()}
    data["key"] = torch.tensor(1)
    found: dict[str, Any] = {}

    def look(graph: Any, _: Any) -> Any:
        plain = GraphModule(graph, copy.deepcopy(graph.graph))
        overlap(graph.graph)
        graph.recompile()
        found["plain"], found["overlap"] = (measure(list(g.graph.nodes)) for g in (plain, graph))

        def both(*inputs: Any) -> Any:
            results = [tree.leaves(g(*inputs)) for g in (plain, graph)]
            found["same"] = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            return results[0]

        return make_boxed_func(both)

    step = value_and_grad(loss, "step", aot_autograd(fw_compiler=look))
    step(params, data, torch.tensor(1.0, dtype=PRECISIONS[precision].param))
    return found


def measure(nodes: list[Any]) -> dict[str, float]:
    """Count products between start and wait."""
    place = {n: i for i, n in enumerate(nodes)}
    products = [i for i, n in enumerate(nodes) if n.target is torch.ops.aten.mm.default]
    out: dict[str, float] = {}
    spans: list[tuple[int, int]] = []
    for kind, names in (("gather", GATHERS), ("scatter", SUMS)):
        starts = [n for n in nodes if str(n.target) in names]
        pairs = [(place[n], place[next(user for user in n.users if str(user.target) in ENDS)]) for n in starts]
        out[kind] = sum(any(a < p < b for p in products) for a, b in pairs) / len(pairs)
        out[f"{kind}s"] = len(pairs)
        spans += pairs if kind == "gather" else []
    out["in_flight"] = max(sum(a <= p < b for a, b in spans) for p in products)
    return out
