"""FlashAttention 4 on Hopper and Blackwell GPUs, where the package ``flash-attn-4`` is installed: whole rows, windows and documents.

The package writes its kernels in Python and compiles them at the first call with each kind of argument. A compiled step must not look
inside that, so forward and backward are two operations here, and the package is loaded when one of them first runs.
"""

import functools
import importlib
import importlib.metadata
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from mtl.kernels import varlen
from mtl.kernels.masks import Documents, Mask
from mtl.kernels.once import once
from mtl.kernels.plain import Pair, Triple

LARGEST = {9: 256, 10: 128}
"""The largest head by the first number of a device's compute capability: Hopper and Blackwell (whose kernels for 256 have no windows)."""

_BOTH = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale window_size_left window_size_right"
CALLED = {"_flash_attn_fwd": f"{_BOTH} return_lse", "_flash_attn_bwd": f"{_BOTH} out dout lse deterministic dq dk dv"}
"""The package's functions that are called here, and the arguments they are given."""

_library: Any = torch.library.Library("mtl_flash4", "DEF")
_library.define(
    "flash4_attention(Tensor q, Tensor k, Tensor v, Tensor? cut_queries, Tensor? cut_keys, int queries, int keys, int? left, int? right, "
    "float scale) -> (Tensor, Tensor)"
)
_library.define(
    "flash4_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cut_queries, Tensor? cut_keys, "
    "int queries, int keys, int? left, int? right, float scale, bool deterministic) -> (Tensor, Tensor, Tensor)"
)


def refuses(q: Tensor, k: Tensor, mask: Mask, documents: Documents | None) -> str | None:
    """Say why this cannot attend so, or None. A meta tensor stands for a GPU's."""
    if q.device.type not in ("cuda", "meta"):
        return f"needs a CUDA device, not {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {q.dtype}"
    if not installed():
        return "needs the flash-attn-4 package: pip install flash-attn-4, for CUDA 13 'flash-attn-4[cu13]'"
    found = capability(q.device)
    if found not in (None, *LARGEST):
        return f"needs an NVIDIA device of compute capability {' or '.join(map(str, LARGEST))}, not {found}"
    largest = max(LARGEST.values()) if found is None else LARGEST[found]
    if q.shape[-1] > largest or q.shape[-1] % 8:
        return f"needs a head size up to {largest} and divisible by 8, not {q.shape[-1]}"
    if documents is not None and (why := varlen.refuses(mask, q.shape[1], k.shape[1])):
        return why
    if documents is None and any(side is not None and side < 0 for side in window(mask, q.shape[1], k.shape[1])):
        return "has no windows that begin or end before a query's place beside the last keys"
    return None if found is None else problem()


@functools.cache
def installed() -> bool:
    """Tell whether the package is there. Its folder alone does not say so: flash-attn has older kernels in one of the same name."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def problem() -> str | None:
    """Say why the package that is there cannot be used, or None: it is young, and what is called here may change. Loads it (6 s)."""
    try:
        package = _package()
    except Exception as error:
        return f"needs a flash-attn-4 that loads; this one says {type(error).__name__}: {error}"
    for name, words in CALLED.items():
        known = inspect.signature(getattr(package, name, lambda: None)).parameters
        if missing := [word for word in words.split() if word not in known]:
            return f"needs flash-attn-4 as of 4.0.0b36; the {name} of this one has no {', '.join(missing)}"
    return None


def capability(device: torch.device) -> int | None:
    """Give the first number of a device's compute capability: 0 where it is not NVIDIA's, None where no device is there to ask."""
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and torch.cuda.is_available() else None


def window(mask: Mask, queries: int, keys: int) -> tuple[int | None, int | None]:
    """Say how many keys left and right of its place a query sees (None: all), where the last query stands beside the last key."""
    if mask.trivial(queries, keys):
        return None, None
    shift = mask.offset - (keys - queries)
    return None if mask.window is None else mask.window - 1 - shift, shift if mask.causal else None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Documents | None, scale: float) -> Pair:
    """Give the result and its logsumexp."""
    if documents is not None:
        return varlen.forward(_forward_of_lengths, q, k, v, mask, documents, scale)
    op: Any = torch.ops.mtl_flash4.flash4_attention
    return op(q, k, v, None, None, q.shape[1], k.shape[1], *window(mask, q.shape[1], k.shape[1]), scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, documents: Documents | None, scale: float
) -> Triple:
    """Give the gradients of queries, keys and values."""
    if documents is not None:
        return varlen.backward(_backward_of_lengths, grad, q, k, v, out, lse, mask, documents, scale)
    exact, sides = torch.are_deterministic_algorithms_enabled(), window(mask, q.shape[1], k.shape[1])
    op: Any = torch.ops.mtl_flash4.flash4_attention_backward
    return once("FlashAttention 4", op, grad, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], *sides, scale, exact)


def _forward_of_lengths(q: Tensor, k: Tensor, v: Tensor, cuts: varlen.Cuts, scale: float) -> Pair:
    op: Any = torch.ops.mtl_flash4.flash4_attention
    return op(q, k, v, cuts.queries, cuts.keys, *cuts.longest, *_sides(cuts), scale)


def _backward_of_lengths(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: varlen.Cuts, scale: float
) -> Triple:
    exact = torch.are_deterministic_algorithms_enabled()
    lengths = (cuts.queries, cuts.keys, *cuts.longest, *_sides(cuts))
    op: Any = torch.ops.mtl_flash4.flash4_attention_backward
    return once("FlashAttention 4", op, grad, q, k, v, out, lse, *lengths, scale, exact)


def _sides(cuts: varlen.Cuts) -> list[int | None]:
    return [None if side < 0 else side for side in cuts.window]


@functools.cache
def _package() -> Any:
    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted to a JitArgument")  # at each kernel it compiles
    return importlib.import_module("flash_attn.cute.interface")


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, cut_queries: Tensor | None, cut_keys: Tensor | None, queries: int, keys: int, left: int | None,
    right: int | None, scale: float,
) -> Pair:  # fmt: skip
    """Run the package's forward on [B, S, H, K], or on tokens [B S, H, K] with cumulative lengths and the longest one."""
    out, lse = _package()._flash_attn_fwd(
        q, k, v, **_lengths(cut_queries, cut_keys, queries, keys), softmax_scale=scale, window_size_left=left, window_size_right=right,
        return_lse=True,
    )[:2]  # fmt: skip
    return out, lse


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cut_queries: Tensor | None, cut_keys: Tensor | None,
    queries: int, keys: int, left: int | None, right: int | None, scale: float, deterministic: bool,
) -> Triple:  # fmt: skip
    """Run the package's backward. Beside the gradients it holds those of the queries, and of shared keys and values, in float32."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _package()._flash_attn_bwd(
        q, k, v, out, grad, lse, **_lengths(cut_queries, cut_keys, queries, keys), softmax_scale=scale, window_size_left=left,
        window_size_right=right, deterministic=deterministic, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return dq, dk, dv


def _lengths(cut_queries: Tensor | None, cut_keys: Tensor | None, queries: int, keys: int) -> dict[str, Any]:
    if cut_queries is None:
        return {}
    return {"cu_seqlens_q": cut_queries, "cu_seqlens_k": cut_keys, "max_seqlen_q": queries, "max_seqlen_k": keys}


def _forward_shapes(q: Tensor, *_: Any) -> Pair:
    sizes = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(sizes, dtype=torch.float32)


def _backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Triple:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_library.impl("flash4_attention", launch_forward, "CUDA")
_library.impl("flash4_attention_backward", launch_backward, "CUDA")
_library.impl("flash4_attention", _forward_shapes, "Meta")
_library.impl("flash4_attention_backward", _backward_shapes, "Meta")
