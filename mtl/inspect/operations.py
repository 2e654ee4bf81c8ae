"""What an operation is and how much it computes, from its name and the shapes it is given."""

import math
from collections.abc import Mapping
from typing import Any

MATMULS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm", "head_logits", "head_pull_")
REDUCTIONS = (
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "logsumexp",
    "var_mean",
    "native_layer_norm",
    "native_layer_norm_backward",
    "prod",
    "linalg_vector_norm",
)
OPAQUE = (
    "park", "unpark",
    "embedding_dense_backward", "scatter_add", "index_put", "index_put_", "scatter_", "cat", "stack", "rotary_angles", "repeat_interleave",
    "scatter", "cumsum", "sort", "engine_collect", "rounded", "side_by_side", "turned", "heads_apart", "heads_join",
)  # fmt: skip
_CAUSAL = {
    "_scaled_dot_product_cudnn_attention": 6,
    "_scaled_dot_product_cudnn_attention_backward": 14,
    "_scaled_dot_product_flash_attention_for_cpu": 4,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 7,
}
"""Which argument says that the mask is causal."""
_COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single")


def kind_of(name: str, makes: bool) -> str:
    """Say what sort of operation this is: matmul, attention, collective, wait, view, reduction, opaque or pointwise."""
    if name in MATMULS:
        return "matmul"
    if "attention" in name:
        return "attention"
    if name in _COLLECTIVES or name in ("engine_gather", "engine_send"):
        return "collective"
    if name == "wait_tensor":
        return "wait"
    if name in REDUCTIONS:
        return "reduction"
    if name in OPAQUE:
        return "opaque"
    return "pointwise" if makes or name.endswith("_") else "view"


def matmul_shape(name: str, args: Any) -> tuple[int, ...]:
    """Give (batch, m, n, k) of a matrix product; () for anything else."""
    if name not in MATMULS:
        return ()
    if name == "head_pull_":  # gradients of the head, of its input, or of both
        return (int(args[1] is not None) + int(args[2] is not None), args[3].shape[0], args[4].shape[0], args[4].shape[1])
    a, b = (args[1], args[2]) if name in ("addmm", "baddbmm") else (args[0], args[1])
    batch = a.shape[0] if a.dim() == 3 else 1
    return (batch, a.shape[-2], b.shape[-1], a.shape[-1])


def attention_flops(name: str, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Count a fused attention's operations: two products forward, five backward, over the pairs that its mask lets see each other.

    Where documents end is not known before the run: each row counts as one document, which is the most there can be.
    """
    if "attention" not in name:
        return 0
    backward = "backward" in name
    tensors = args[1:] if backward else args
    q, k = tensors[0], tensors[1]
    if name.startswith("document_attention"):  # [B, S, H, K], with causal, window, offset before the scale
        batch, queries, heads, head = q.shape
        causal, window, offset = args[-4:-1]
        pairs = seen(queries, k.shape[1], None if window is None else offset - window + 1, offset if causal else None)
    elif name.startswith("_flash_attention"):  # [B, S, H, K] with windows, or documents of B S tokens one after the other
        if q.dim() == 4:
            batch, queries, heads, head = q.shape
            keys = k.shape[1]
        else:
            queries, keys = args[8:10] if backward else args[5:7]
            batch, heads, head = q.shape[0] // queries, *q.shape[1:]
        left, right = kwargs.get("window_size_left", -1), kwargs.get("window_size_right", -1)
        pairs = band(queries, keys, left, right)
    elif name.startswith("flash4_attention"):  # likewise, with lengths, longest queries and keys, and the window after the tensors
        queries, keys, left, right = tensors[7:11] if backward else tensors[5:9]
        batch = math.prod(q.shape[:-2]) // queries
        heads, head = q.shape[-2:]
        pairs = band(queries, keys, -1 if left is None else left, -1 if right is None else right)
    else:  # [B, H, S, K], causal or not
        batch, heads, queries, head = q.shape
        keys = k.shape[2]
        flag = _CAUSAL.get(name)
        causal = flag is not None and len(args) > flag and bool(args[flag])  # defaults are left out
        pairs = queries * (queries + 1) // 2 if causal else queries * keys
    return (10 if backward else 4) * batch * heads * head * pairs


def attention_room(name: str, args: Any) -> int:
    """Count the bytes that a fused attention's backward takes on GPUs beside its arguments and results.

    Queries' gradients are summed in float32. Those of keys and values that several heads share are too in FlashAttention 4; the other
    kernels make each head's and sum them.
    """
    if "attention" not in name or "backward" not in name or "for_cpu" in name or name.startswith("document"):
        return 0
    q, k, v = args[1:4]
    shared = k.numel() < q.numel()
    if name.startswith("flash4"):
        return 4 * (q.numel() + (k.numel() + v.numel() if shared else 0))
    return 4 * q.numel() + (2 * q.numel() * q.element_size() if shared else 0)


def band(queries: int, keys: int, left: int, right: int) -> int:
    """Count the pairs of a window, counted from the lower right corner of the score matrix; -1 is no limit."""
    shift = keys - queries
    return seen(queries, keys, None if left < 0 else shift - left, None if right < 0 else shift + right)


def seen(queries: int, keys: int, first: int | None, last: int | None) -> int:
    """Count the pairs where query i sees keys i + first to i + last; None is no limit."""
    total = 0
    for i in range(queries):
        low = 0 if first is None else max(0, i + first)
        high = keys - 1 if last is None else min(keys - 1, i + last)
        total += max(0, high - low + 1)
    return total
