"""What weights are scaled by for 8 bits, known before the first of them is gathered: then they travel in 8 bits.

The largest value of a weight that rests in parts is known after an all-reduce. Were there one for each weight, every gather would wait for
its own, and none could start ahead (`mtl/runtime/overlap.py`). So all are found in one, once a step, before anything else.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtl import tree
from mtl.axes import MESH_AXES
from mtl.kernels import fp8
from mtl.sharding.collectives import pmax
from mtl.sharding.layout import Axes
from mtl.sharding.parallel import Parallel


def weight_scales(par: Parallel, projections: Mapping[str, str], layers: Mapping[str, Any], dtype: torch.dtype) -> tree.Tree:
    """Find the factors of stacked weights [L, ...] that are gathered layer by layer: name to {"scale": [L]}, to be put beside them.

    ``projections`` has the axes of each one's weight in a layer. Factors are those of the weights in use, in ``dtype``, on this device's
    part of any other axis: what `mtl.kernels.fp8.scale_for` finds after a gather. Without one scale a side in 8 bits, there are none.
    """
    if par.fp8 != "tensor" or par.rules.gather != "layer":
        return {}
    largest: dict[Axes, dict[str, Tensor]] = {}
    for name, letters in projections.items():
        store, compute = (par.layout(letters, table).used() for table in ("store", "compute"))
        axes = tuple(axis for axis in MESH_AXES if axis in store and axis not in compute)
        if axes:
            w = layers[name]["weight"]
            largest.setdefault(axes, {})[name] = torch.linalg.vector_norm(w.flatten(1), torch.inf, 1)  # reads once, and makes nothing
    found: dict[str, Any] = {}
    for axes, mine in largest.items():
        # The largest of rounded values is the largest, rounded.
        scales = fp8.scale_of(pmax(torch.stack(list(mine.values())).to(dtype).float(), axes, par.mesh))
        found |= {name: {"scale": scale} for name, scale in zip(mine, scales.unbind(0), strict=True)}
    return {"layers": found}
