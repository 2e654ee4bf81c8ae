"""What torch itself offers for the ops that ops.py times."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_aten: Any = torch.ops.aten
Run = Callable[[], Tensor]


def square_alternatives(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Run]:
    """Give torch's own choice for causal attention."""

    def sdpa(backend: SDPBackend | None = None) -> Tensor:
        a, b, c = (x.transpose(1, 2) for x in (q, k, v))
        with nullcontext() if backend is None else sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

    return {"torch": sdpa, "torch, cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION)} if q.device.type == "cuda" else {"torch": sdpa}


def packed_alternatives(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float) -> dict[str, Run]:
    """Give cuDNN with cumulative lengths, which torch uses for nested tensors."""
    return {"cudnn, lengths": lambda: CudnnLengths.run(q, k, v, ends, scale)} if q.device.type == "cuda" else {}


class CudnnLengths(torch.autograd.Function):
    """cuDNN's attention over cumulative lengths, through the op that nested tensors use."""

    @staticmethod
    def run(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float) -> Tensor:
        """Attend within documents."""
        rows = torch.arange(ends.shape[0], device=ends.device).unsqueeze(1) * q.shape[1]
        cuts = torch.cat([ends.new_zeros(1), (ends + rows).flatten()]).to(torch.int32)
        out: Any = CudnnLengths.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cuts, q.shape[1], scale)
        return out.unflatten(0, q.shape[:2])

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, longest: int, scale: float) -> Tensor:
        """Attend."""
        found = _aten._cudnn_attention_forward(q, k, v, None, cuts, cuts, longest, longest, True, 0.0, True, False, scale=scale)
        ctx.save_for_backward(q, k, v, found[0], found[1], cuts, found[6], found[7])
        ctx.longest, ctx.scale = longest, scale
        return found[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Give gradients."""
        q, k, v, out, lse, cuts, seed, offset = ctx.saved_tensors
        found = _aten._cudnn_attention_backward(
            grads[0].contiguous(), q, k, v, out, lse, seed, offset, None, cuts, cuts, ctx.longest, ctx.longest, 0.0, True, scale=ctx.scale
        )
        return *found[:3], None, None, None


def torch_head(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Give the head and loss as they are written plainly, summed over tokens."""
    logits = x.flatten(0, 1) @ w.to(x.dtype)
    return F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")


def torch_adamw(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    """Give torch's fused AdamW after its clipping."""
    held = [p.detach().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(held, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def run() -> None:
        for p, g in zip(held, grads, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        optimizer.step()

    return run
