"""The weights of decoding: those that share an input lie side by side, so that a token multiplies query, key and value as one.

A product of one row takes as long as its weights take to be read, and small weights are read slowly: on an H200 4096 x 1024 at 1.1 TB/s,
the three of attention as one at 3.1, gate and up as one at 4.1 where each alone reaches 3.4 (docs/benchmarks.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl import tree
from mtl.axes import names
from mtl.ops.linear import joined, may_join
from mtl.params import in_type
from mtl.precision import Precision
from mtl.sharding.mesh import Mesh
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules
from mtl.sharding.shard_map import to_global, to_local
from mtl.train.evaluate import in_use


@torch.no_grad()
def lay_side_by_side(model: Any, config: Any, mesh: Mesh, rules: Rules, params: Mapping[str, Any]) -> None:
    """Move parameters, DTensors at rest, so that those multiplied together lie side by side; values and layouts stay.

    The tree's own leaves are replaced, one group of weights after the other, so that nothing is held twice.
    """
    par = Parallel(mesh, rules, model.sizes(config))
    for group in model.together(config):
        _move(par, group, params["layers"])


def ready(model: Any, config: Any, par: Parallel, precision: Precision, params: Any) -> Any:
    """Bring parameters to what a token is computed with: local, gathered where the rules gather once, in the type of products.

    Weights that share an input become one where that costs no memory: they lie side by side, or are copied on the way anyway.
    """
    specs, local = model.specs(config), in_use(model, config, par, precision, params)
    ones: dict[str, Any] = {}
    for group in model.together(config):
        ws = [local["layers"][name]["weight"] for name in group]
        copied = par.rules.gather == "step" or any(w.dtype != precision.compute for w in ws)
        if not may_join(par, list(group.values()), ws):
            continue
        one = as_one(ws)
        if copied and (one is None or one.dtype != precision.compute):
            one = _laid(par, group, ws, precision.compute)
        if one is not None:
            ones[joined(group)] = {"weight": one}
            specs, local = _without(specs, group), _without(local, group)
    used = in_type(specs, local, precision.compute)
    return {**used, "layers": {**used["layers"], **ones}}


def as_one(ws: Sequence[Tensor]) -> Tensor | None:
    """Give stacked weights (L, D, ...) as one (L, D, W) if they lie side by side in memory, else None."""
    flat = [w.flatten(2) for w in ws]
    first, end = flat[0], flat[0].storage_offset()
    for w in flat:
        if (
            w.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or w.stride() != first.stride()
            or w.storage_offset() != end
        ):
            return None
        end += w.shape[2] * w.stride(2)
    return first.as_strided((*first.shape[:2], sum(w.shape[2] for w in flat)), first.stride())


def _move(par: Parallel, group: Mapping[str, str], layers: Mapping[str, Any]) -> None:
    ws = [to_local(layers[name]["weight"]) for name in group]
    if len({w.dtype for w in ws}) > 1 or not may_join(par, list(group.values()), ws):
        return
    parts = _laid(par, group, ws, ws[0].dtype).split([w[0, 0].numel() for w in ws], 2)
    for (name, letters), w, part in zip(group.items(), ws, parts, strict=True):
        shape = tuple(layers[name]["weight"].shape)
        layout = par.rules.layout("store", names(f"L{letters}"), shape, par.mesh.shape, f"parameter {name!r}")
        layers[name]["weight"] = to_global(part.unflatten(2, w.shape[2:]), shape, layout, par.mesh)


def _laid(par: Parallel, group: Mapping[str, str], ws: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Copy stacked weights into one (L, D, W): in memory by rows where devices gather rows, else by columns, which is read fastest."""
    count, rows, columns = *ws[0].shape[:2], sum(w[0, 0].numel() for w in ws)
    if _gathered(par, next(iter(group.values()))):
        one = torch.empty(count, rows, columns, dtype=dtype, device=ws[0].device)
    else:
        one = torch.empty(count, columns, rows, dtype=dtype, device=ws[0].device).transpose(1, 2)
    for w, part in zip(ws, one.split([w[0, 0].numel() for w in ws], 2), strict=True):
        part.copy_(w.flatten(2))
    return one


def _gathered(par: Parallel, letters: str) -> bool:
    return par.rules.gather == "layer" and par.layout(letters, "store") != par.layout(letters, "compute")


def _without(given: tree.Tree, group: Mapping[str, str]) -> Any:
    """Leave the weights of some projections out."""
    layers = {name: {k: x for k, x in p.items() if k != "weight"} if name in group else p for name, p in given["layers"].items()}
    return {**given, "layers": {name: p for name, p in layers.items() if p}}
