"""Few rows times a weight, on GPUs: what decoding does at a small batch, bound by how fast the weights are read.

A product of one row reads two bytes of weight for two operations, so only that counts which keeps the memory busy: many loads under way
in every program, and few kernels. What stands around a product in a layer is part of its kernel: a norm before it, a gated activation
or a sum after it.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.precision import wide

MOST_ROWS = 1
"""From how many rows on the libraries' products are faster."""
TYPES = (torch.bfloat16, torch.float16)

_library: Any = torch.library.Library("mtl", "FRAGMENT")
_library.define("few_rows(Tensor x, Tensor w, Tensor? scale, float eps, bool gated, Tensor? more) -> Tensor")


def refuses(x: Tensor, w: Tensor) -> str | None:
    """Say why the kernel cannot multiply x (R, K) by w (K, N), or None."""
    if x.device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return "runs on CUDA devices with Triton"
    if x.shape[0] > MOST_ROWS or x.dtype not in TYPES or w.dtype != x.dtype:
        return f"takes at most {MOST_ROWS} rows in bfloat16 or float16"
    if w.stride(0) != 1 or w.stride(1) % 8:
        return "reads a weight by columns, each from a multiple of 16 bytes on"
    return None


def multiply(
    x: Tensor, w: Tensor, scale: Tensor | None = None, eps: float = 0.0, gated: bool = False, more: Tensor | None = None
) -> Tensor:
    """Multiply x (R, K) by w (K, N), summed in at least float32 and rounded once.

    With ``scale`` [K] the rows are divided by their root mean square and scaled before. ``gated`` takes the columns for gates and as many
    values, and gives silu(gate) x value (R, N / 2). ``more`` (R, N) is added.
    """
    op: Any = torch.ops.mtl.few_rows
    return op(x, w, scale, eps, gated, more)


def launch(x: Tensor, w: Tensor, scale: Tensor | None, eps: float, gated: bool, more: Tensor | None) -> Tensor:
    """Launch the kernel; see `multiply`."""
    rows, inner = x.shape
    columns = w.shape[1] // 2 if gated else w.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    each, block, warps = shape(inner, columns, gated)
    if more is not None and more.stride(1) != 1:
        more = more.contiguous()
    whole = inner % block == 0 and columns % each == 0
    _kernel()[(-(-columns // each),)](
        x, w, x if scale is None else scale, x if more is None else more, out,
        x.stride(0), w.stride(1), 0 if more is None else more.stride(0), out.stride(0), rows, columns, eps,
        ROWS=1 << (rows - 1).bit_length(), INNER=inner, COLUMNS=each, BLOCK=block,
        NORM=scale is not None, GATED=gated, ADD=more is not None, EVEN=whole, num_warps=warps,
    )  # fmt: skip
    return out


def shape(inner: int, columns: int, gated: bool) -> tuple[int, int, int]:
    """Choose a program's columns, how much of them it reads at a time, and its warps: as measured on an H200 for an 8B model."""
    block = min((4096, 2048, 1024), key=lambda size: (-(-inner // size) * size, -size))
    return (2, block, 8) if gated else (4 if columns > 4096 and block == 4096 else 1, block, 4)


def plain(x: Tensor, w: Tensor, scale: Tensor | None, eps: float, gated: bool, more: Tensor | None) -> Tensor:
    """Do the same in separate operations: what the kernel means; see `multiply`."""
    kind = wide(x.dtype)
    y = x.to(kind)
    if scale is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * scale.to(kind)
    y = y @ w.to(kind)
    if gated:
        gate, value = y.chunk(2, -1)
        y = F.silu(gate) * value
    return (y if more is None else y + more.to(kind)).to(x.dtype)


def _shape(x: Tensor, w: Tensor, scale: Tensor | None, eps: float, gated: bool, more: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1] // 2 if gated else w.shape[1])


@functools.cache
def _kernel() -> Any:
    return importlib.import_module("mtl.kernels.few_rows_triton").multiply


_library.impl("few_rows", launch, "CUDA")
_library.impl("few_rows", plain, "CPU")
torch.library.register_fake("mtl::few_rows", _shape, lib=_library)
