"""Token embedding with the vocabulary whole or split over devices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.ops.linear import fetch
from mtl.sharding.parallel import Parallel


def embedding(par: Parallel, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up tokens [B, S] in a table at rest (V, D) and give the residual stream (B, R, D).

    With the vocabulary split, every device looks up the tokens it has rows for and the sum over devices joins them.
    """
    w = fetch(par, "VD", table, dtype)
    axes = par.axes("V", "compute")
    if not axes:
        return par.reshard(F.embedding(tokens, w), "BSD", "BRD")
    start, size = par.span("V", "compute")
    local = tokens - start
    here = (local >= 0) & (local < size)
    rows = F.embedding(local.clamp(0, size - 1), w) * here.unsqueeze(-1).to(dtype)
    return par.reshard(rows, "BSD", "BRD", partial=axes)
