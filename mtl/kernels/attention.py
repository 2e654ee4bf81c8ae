"""Attention kernels as pairs: forward gives (out, logsumexp), backward takes them. That is what whole, gathered and ring attention need.

Queries are [B, Q, H, K], keys and values [B, T, N, K] with H a multiple of N; the logsumexp is [B, H, Q] in at least float32.
"""

import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from mtl.errors import UserError, unknown
from mtl.kernels import cpu_documents, flash4, ordered, plain, varlen
from mtl.kernels.masks import Documents, Mask
from mtl.kernels.plain import Pair, Triple
from mtl.kernels.results import Results, again

_aten: Any = torch.ops.aten


class Kernel(NamedTuple):
    """A forward and backward, and what they can do (None, or why not)."""

    forward: Callable[[Tensor, Tensor, Tensor, Mask, Documents | None, float], Pair]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Mask, Documents | None, float], Triple]
    refuses: Callable[[Tensor, Tensor, Mask, Documents | None], str | None]


ORDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "auto": ("flash4", "cudnn", "flash", "cpu", "plain"),
        "narrow": ("cudnn", "flash4", "flash", "cpu", "plain"),
        "loaded": ("cudnn", "flash", "cpu", "plain"),
    }
)
"""Kernels, the fastest first; "narrow" is auto for heads below ``NARROW``, with which FlashAttention 4 was not timed; "loaded" has those
alone that need no package loaded, for who attends once.
"""
NARROW = 64


def choose(name: str, q: Tensor, k: Tensor, mask: Mask, documents: Documents | None) -> Kernel:
    """Find a kernel by name, or for "auto" the fastest that can do this."""
    if name not in ORDERS and name not in KERNELS:
        raise unknown("attention impl", name, ("auto", *KERNELS))
    order = "narrow" if name == "auto" and q.shape[-1] < NARROW else name
    for candidate in ORDERS.get(order, (name,)):
        why = KERNELS[candidate].refuses(q, k, mask, documents)
        if why is None:
            return KERNELS[candidate]
        if name not in ORDERS:
            raise UserError(f"attention impl {name!r} {why}. Choose impl auto or plain.")
    raise AssertionError("plain refuses nothing")


# ---------------------------------------------------------------- torch's CPU kernel


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2) if x.shape[2] != heads else x


def _collapse(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).sum(3) if x.shape[2] != heads else x


def _cpu_refuses(q: Tensor, k: Tensor, mask: Mask, documents: Documents | None) -> str | None:
    if q.device.type != "cpu":
        return f"runs on the CPU, not on {q.device.type}"
    return None if documents is not None else _shape_refuses(q, k, mask, None)


def _shape_refuses(q: Tensor, k: Tensor, mask: Mask, documents: Documents | None) -> str | None:
    if documents is not None:
        return "has no document masks"
    square = mask.offset == 0 and q.shape[1] == k.shape[1] and (mask.window is None or mask.window >= k.shape[1])
    if not (square or mask.trivial(q.shape[1], k.shape[1])):
        return "has neither windows nor causal masks that are not square"
    return None


def _causal(q: Tensor, k: Tensor, mask: Mask) -> bool:
    return not mask.trivial(q.shape[1], k.shape[1])


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents | None, scale: float) -> Pair:
    if documents is not None:
        return cpu_documents.forward(q, k, v, mask, documents, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, _expand(k, q.shape[2]), _expand(v, q.shape[2])))
    causal = _causal(q.transpose(1, 2), k.transpose(1, 2), mask)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, documents: Documents | None, scale: float
) -> Triple:
    if documents is not None:
        return cpu_documents.backward(grad, q, k, v, out, lse, mask, documents, scale)
    heads, causal = k.shape[2], _causal(q, k, mask)
    args = [x.transpose(1, 2) for x in (grad, q, _expand(k, q.shape[2]), _expand(v, q.shape[2]), out)]
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, lse, 0.0, causal, scale=scale)
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    return dq, _collapse(dk, heads), _collapse(dv, heads)


# ---------------------------------------------------------------- cuDNN


def _gpu_refuses(q: Tensor) -> str | None:
    if q.device.type not in ("cuda", "meta"):
        return f"needs a CUDA device, not {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {q.dtype}"
    return None


def _cudnn_refuses(q: Tensor, k: Tensor, mask: Mask, documents: Documents | None) -> str | None:
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"needs a head size up to 128 and divisible by 8, not {q.shape[-1]}"
    if torch.version.hip is not None:
        return "needs an NVIDIA device"
    if torch.are_deterministic_algorithms_enabled() and (why := ordered.refuses()):
        return f"adds up gradients in any order, deterministic is on, and what adds them up in order {why}"
    return _gpu_refuses(q) or _shape_refuses(q, k, mask, documents)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents | None, scale: float) -> Pair:
    causal = _causal(q, k, mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return out.transpose(1, 2), lse.squeeze(-1)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, documents: Documents | None, scale: float
) -> Triple:
    args = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    sizes = (q.shape[1], k.shape[1])
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        *args, lse.unsqueeze(-1), seed, seed, None, None, None, *sizes, 0.0, _causal(q, k, mask), scale=scale
    )
    if torch.are_deterministic_algorithms_enabled():
        return ordered.queries(grad, q, k, v, out, lse, _causal(q, k, mask), scale), grads[1].transpose(1, 2), grads[2].transpose(1, 2)
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


# ---------------------------------------------------------------- FlashAttention 2, as torch ships it


def _flash_refuses(q: Tensor, k: Tensor, mask: Mask, documents: Documents | None) -> str | None:
    window = _flash_window(q, k, mask)
    if documents is not None and (why := varlen.refuses(mask, q.shape[1], k.shape[1])):
        return why
    if documents is None and window and mask.window is not None and window["window_size_left"] < 0:
        return "has no windows that end before a query's place"
    if documents is None and window and (why := _flash_cuts(q.shape[1], k.shape[1], mask.causal, window["window_size_right"])):
        return why
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"needs a head size up to 256 and divisible by 8, not {q.shape[-1]}"
    return _gpu_refuses(q)


def _flash_cuts(queries: int, keys: int, causal: bool, right: int) -> str | None:
    """FlashAttention 2 takes what is below 0 for no limit, and as many keys for the most that no limit can be."""
    if (causal and right < 0) or (queries > keys and not 0 <= right < keys):
        return f"sees other keys than a window of {right} keys to the right, with {queries} queries and {keys} keys"
    return None


def _flash_window(q: Tensor, k: Tensor, mask: Mask) -> dict[str, int]:
    """Say the mask as FlashAttention's window, which counts from the lower right corner of the score matrix."""
    if mask.trivial(q.shape[1], k.shape[1]):
        return {}
    shift = mask.offset - (k.shape[1] - q.shape[1])
    left = -1 if mask.window is None else mask.window - 1 - shift
    return {"window_size_left": left, "window_size_right": shift if mask.causal else -1}


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents | None, scale: float) -> Pair:
    if documents is not None:
        return varlen.forward(varlen.torch_forward, q, k, v, mask, documents, scale)
    window = _flash_window(q, k, mask)
    out = _aten._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, scale=scale, **window)
    return out[0], out[1]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, documents: Documents | None, scale: float
) -> Triple:
    if documents is not None:
        return varlen.backward(varlen.torch_backward, grad, q, k, v, out, lse, mask, documents, scale)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    sizes, window = (q.shape[1], k.shape[1]), _flash_window(q, k, mask)
    args = (grad.contiguous(), q, k, v, out, lse, None, None, *sizes, 0.0, False, state, state)
    dq, dk, dv = _aten._flash_attention_backward(*args, scale=scale, **window)
    return dq, dk, dv


# ---------------------------------------------------------------- the flash-attn package


def _package_refuses(q: Tensor, k: Tensor, mask: Mask, documents: Documents | None) -> str | None:
    found = importlib.util.find_spec("flash_attn")
    if found is None or found.origin is None:  # flash-attn-4 alone makes a folder of the name, with no package in it
        return "needs the flash-attn package: pip install 'mtl[flash]'"
    return _flash_refuses(q, k, mask, documents)


def _package_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents | None, scale: float) -> Pair:
    if documents is not None:
        return varlen.forward(varlen.package_forward, q, k, v, mask, documents, scale)
    ops: Any = importlib.import_module("flash_attn.flash_attn_interface")
    window = _flash_window(q, k, mask)
    left, right = window.get("window_size_left", -1), window.get("window_size_right", -1)
    out, lse = ops._wrapped_flash_attn_forward(q, k, v, 0.0, scale, False, left, right, 0.0, None, False)[:2]
    return out, lse


def _package_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, documents: Documents | None, scale: float
) -> Triple:
    if documents is not None:
        return varlen.backward(varlen.package_backward, grad, q, k, v, out, lse, mask, documents, scale)
    ops: Any = importlib.import_module("flash_attn.flash_attn_interface")
    window = _flash_window(q, k, mask)
    left, right = window.get("window_size_left", -1), window.get("window_size_right", -1)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    ops._wrapped_flash_attn_backward(
        grad.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        0.0,
        scale,
        False,
        left,
        right,
        0.0,
        None,
        torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "plain": Kernel(plain.forward, plain.backward, lambda q, k, mask, documents: None),
        "cpu": Kernel(_cpu_forward, _cpu_backward, _cpu_refuses),
        "cudnn": Kernel(_cudnn_forward, _cudnn_backward, _cudnn_refuses),
        "flash": Kernel(_flash_forward, _flash_backward, _flash_refuses),
        "flash_attn": Kernel(_package_forward, _package_backward, _package_refuses),
        "flash4": Kernel(flash4.forward, flash4.backward, flash4.refuses),
    }
)


class _Attend(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, mask: Mask, dq: Any, dk: Any, scale: float, out: Tensor | None, lse: Tensor | None
    ) -> Pair:
        if out is not None and lse is not None:
            return again(out, lse)
        return kernel.forward(q, k, v, mask, None if dq is None else Documents(dq, dk), scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, ctx.kernel, ctx.mask, dq, dk, ctx.scale = inputs[:8]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, *output, dq, dk)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        q, k, v, out, lse, dq, dk = ctx.saved_tensors
        documents = None if dq is None else Documents(dq, dk)
        if ctx.kernel.backward is plain.backward:  # saved results are constants to a second derivative: this backward uses none
            found = plain.own_backward(grad, q, k, v, ctx.mask, documents, ctx.scale)
        else:
            found = ctx.kernel.backward(grad, q, k, v, out, lse, ctx.mask, documents, ctx.scale)
        return *found, *[None] * 7


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents | None, scale: float, impl: str = "auto",
    results: Results | None = None,
) -> Tensor:  # fmt: skip
    """Attend on one device: queries [B, Q, H, K] over keys and values [B, T, N, K]; gives [B, Q, H, K]."""
    kernel = choose(impl, q, k, mask, documents)
    ends = (None, None) if documents is None else documents
    results = results or Results()
    out = _Attend.apply(q, k, v, kernel, mask, *ends, scale, *results.known())
    assert isinstance(out, tuple)
    results.note(*out)
    return out[0]
