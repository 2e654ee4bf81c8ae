"""Compile the gradient of an FSDP step with its layers as one piece, and without, and compare what comes out."""

import dataclasses
from typing import Any

import torch

import sharding_rules
from mtl import tree
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.runtime import overlap
from mtl.sharding.shard_map import to_local
from mtl.train.gradient import value_and_grad
from mtl.train.loss import make_loss, parse_remat
from tests.cases.train import batch, parallel
from tests.small import BATCH, LLAMA, MESHES

LAYERS = 7


def gradients(precision: str, engine: bool, remat: str = "none") -> dict[str, Any]:
    """Give how often each piece is called, and whether gradients are the same bits as those of the graph in one."""
    model = dataclasses.replace(LLAMA, layers=LAYERS)
    par = parallel(model, sharding_rules.load("fsdp"), MESHES["fsdp"][2], BATCH // 2, PRECISIONS[precision])
    par = dataclasses.replace(par, engine=engine)
    loss = make_loss(decoder, model, par, PRECISIONS[precision], parse_remat(remat))
    params = tree.map(to_local, init(decoder.specs(model), par.rules, par.mesh, 0, PRECISIONS[precision].param))
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, model, 0, BATCH // 2, False).items()}
    data["key"] = torch.tensor(1)
    called: list[list[int]] = []
    results: list[Any] = []
    real = overlap.roll

    def rolled(graph: Any) -> list[int]:
        called.append(real(graph))
        return called[-1]

    for how in (lambda _: [], rolled):
        overlap.roll = how
        options = {"emulate_precision_casts": True, "reorder_for_locality": False, **overlap.options()}
        step = value_and_grad(loss, "step", "inductor", options)
        with torch._inductor.config.patch(force_disable_caches=True):
            results.append(tree.leaves(step(params, data, torch.tensor(1.0, dtype=PRECISIONS[precision].param))))
    overlap.roll = real
    whole, pieces = results
    same = all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    return {"called": called[0], "same": same, "leaves": len(whole)}
