"""Token embedding with the vocabulary whole or split over devices, and rows exchanged where the table rests in columns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.ops.linear import fetch
from mtl.sharding.collectives import all_gather, all_to_all
from mtl.sharding.layout import Axes
from mtl.sharding.parallel import Parallel


def embedding(par: Parallel, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up tokens [B, S] in a table at rest (V, D) and give the residual stream (B, R, D).

    With the vocabulary split, every device looks up the tokens it has rows for and the sum over devices joins them. Where the table rests
    in columns and a device has fewer tokens than the table has rows, every device looks up the tokens of all in its columns and they
    exchange rows (`exchanged_over`). Backward sends the rows' gradients back, and sums them in the table's type where it rests.
    """
    over = exchanged_over(par, tokens.numel())
    if over:
        everyones = all_gather(tokens, over, par.mesh)
        rows = F.embedding(everyones, table).to(dtype)  # rounded after the lookup: no more than is sent
        return par.reshard(all_to_all(rows, over, par.mesh, split=0, join=2), "BSD", "BRD")
    w = fetch(par, "VD", table, dtype)
    axes = par.axes("V", "compute")
    if not axes:
        return par.reshard(F.embedding(tokens, w), "BSD", "BRD")
    start, size = par.span("V", "compute")
    local = tokens - start
    here = (local >= 0) & (local < size)
    rows = F.embedding(local.clamp(0, size - 1), w) * here.unsqueeze(-1).to(dtype)
    return par.reshard(rows, "BSD", "BRD", partial=axes)


def exchanged_over(par: Parallel, tokens: int) -> Axes:
    """Name the mesh axes over which an embedding of so many tokens a device exchanges rows; none where the table itself is fetched.

    Either way a device takes the same share of what it needs from the others: of as many rows as it has tokens, or of the vocabulary's.
    """
    rows, columns = par.layout("VD", "store").dims
    return columns if par.rules.gather == "layer" and not rows and tokens < par.sizes["vocab"] else ()
