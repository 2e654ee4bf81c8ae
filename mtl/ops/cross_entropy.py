"""The head and its loss: cross-entropy with the vocabulary whole or split over devices."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from mtl.axes import LETTERS
from mtl.errors import unknown
from mtl.kernels.logits import head_logits, head_pull_
from mtl.ops.linear import fetch, linear, travels
from mtl.precision import wide
from mtl.sharding.collectives import pmax, psum
from mtl.sharding.parallel import Parallel

LOGITS = 2**30 - 2**24
"""The fused head computes logits for as many tokens at a time as make at most so many bytes."""
ALIGNED = 64
"""GPUs multiply by heads of such a multiple of columns: rows of 50,257 logits would start between the words that they read at once."""
EXACT = 2
"""Up to so many tiles add up the head's gradient in the type of compute, rounding once each; the sum of more is kept in float32."""


def tile_rows(tokens: int, columns: int, dtype: torch.dtype) -> int:
    """Give how many tokens the fused head takes at a time: tiles of equal size, as few as fit."""
    most = max(1, LOGITS // (columns * dtype.itemsize))
    return -(-tokens // -(-tokens // most))


def cross_entropy(
    par: Parallel, letters: str, x: Tensor, w: Tensor, targets: Tensor, weights: Tensor, z_loss: float = 0.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Give this device's share of (loss, plain cross-entropy): sums over tokens of weight times loss.

    x is (B, S, D), targets and weights (B, S); w is the head at rest, "DV", or "VD" where it is the embedding table. Summed over all
    devices the shares count every token once. ``z_loss`` times the squared log of the softmax's denominator is added to the loss. impl is
    "plain", "fused" (logits live a tile at a time and are never kept) or "auto".
    """
    if impl not in ("auto", "plain", "fused"):
        raise unknown("cross-entropy impl", impl, ("auto", "plain", "fused"))
    if impl == "fused" or (impl == "auto" and x.device.type != "cpu"):
        # A head that does not travel is cast inside, so that its gradient is what the tiles' products add up to, not a copy of that.
        head = fetch(par, letters, w, x.dtype if travels(par, letters, w) else w.dtype)
        head = head.t() if letters == "VD" else head
        odd = 0 if x.device.type == "cpu" else -head.shape[1] % ALIGNED
        loss, entropy = _fused(par, x, pad(head, (0, odd)) if odd else head, targets, weights, z_loss)
    else:
        logits = linear(par, f"BSD,{letters}->BSV", x, w).to(wide(x.dtype))
        entropy_, square = _plain(par, _hide_padding(par, logits), targets)
        entropy = (entropy_ * weights).sum()
        loss = entropy + z_loss * (square * weights).sum()
    share = 1.0 / par.copies("BS")
    return loss * share, entropy * share


def _hide_padding(par: Parallel, logits: Tensor) -> Tensor:
    start, size = par.span("V")
    real = par.sizes[LETTERS["V"]] - start
    if real >= size:
        return logits
    return logits.masked_fill(torch.arange(size, device=logits.device) >= real, float("-inf"))


def _plain(par: Parallel, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Give each token's cross-entropy and squared logsumexp, from logits with the vocabulary split."""
    axes = par.axes("V")
    start, size = par.span("V")
    top = pmax(logits.detach().amax(-1), axes, par.mesh)
    lse = top + psum((logits - top.unsqueeze(-1)).exp().sum(-1), axes, par.mesh).log()
    local = targets - start
    here = (local >= 0) & (local < size)
    picked = logits.gather(-1, local.clamp(0, size - 1).unsqueeze(-1)).squeeze(-1)
    picked = psum(torch.where(here, picked, 0.0), axes, par.mesh)
    return lse - picked, lse.square()


def _fused(par: Parallel, x: Tensor, w: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    wanted = (x.requires_grad, w.requires_grad)
    out = _Fused.apply(x.flatten(0, 1), w, targets.flatten(), weights.flatten(), par, z_loss, wanted)
    assert isinstance(out, tuple)
    return out[0], out[1]


class _Fused(Function):
    """Loss and the wanted gradients tile by tile in forward; backward scales them, or leaves them where a compiler sees the scale is 1."""

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, targets: Tensor, weights: Tensor, par: Parallel, z_loss: float, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, ...]:
        axes, (start, size) = par.axes("V"), par.span("V")
        real = min(par.sizes[LETTERS["V"]] - start, size)
        dtype, tile = wide(x.dtype), tile_rows(x.shape[0], w.shape[1], x.dtype)
        loss, entropy = (torch.zeros((), dtype=dtype, device=x.device) for _ in range(2))
        dx = torch.empty_like(x) if wanted[0] else None
        dw = torch.empty_like(w, dtype=x.dtype if x.shape[0] <= EXACT * tile else dtype) if wanted[1] else None
        w = w.to(x.dtype)
        for i, (xs, ts, ws) in enumerate(zip(*(y.split(tile) for y in (x, targets - start, weights.to(dtype))), strict=True)):
            logits, top, total, picked = head_logits(xs, w, ts, real, (dw if dx is None else dx) if i else None)
            most = pmax(top, axes, par.mesh)
            lse = most + psum(total * (top - most).exp(), axes, par.mesh).log()
            plain = ((lse - psum(picked, axes, par.mesh)) * ws).sum()
            entropy = entropy + plain
            loss = loss + plain + z_loss * (lse.square() * ws).sum()
            if any(wanted):
                head_pull_(logits, dw, dx, xs, w, ts, lse, (1.0 + 2.0 * z_loss * lse) * ws, ws, real, i * tile)
        none = torch.zeros((), dtype=dtype, device=x.device)
        return loss, entropy, none if dx is None else dx, none.clone() if dw is None else dw

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[2], output[3])
        ctx.par, ctx.dtype = inputs[4], inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        dx, dw = ctx.saved_tensors
        grad = psum(grad, ctx.par.axes("V"), ctx.par.mesh)
        d_x = (dx.to(grad.dtype) * grad).to(dx.dtype) if ctx.needs_input_grad[0] else None
        d_w = (dw.to(grad.dtype) * grad).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return d_x, d_w, None, None, None, None, None


def next_token_logits(par: Parallel, letters: str, x: Tensor, w: Tensor) -> Tensor:
    """Give whole logits (B, S, vocab) on every device of a row's group, for generation and tests."""
    logits = linear(par, f"BSD,{letters}->BSV", x, w)
    return par.reshard(logits, "BSV", "BS_")[..., : par.sizes["vocab"]]
