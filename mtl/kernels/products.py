"""Large matrix products on Hopper GPUs by the kernels of ``quack-kernels``, where it is installed (flash-attn-4 brings it).

A chip that trains runs at its power limit, and there a kernel is as fast as it is frugal: for large products these take about 3 % less than
cuBLAS's (docs/benchmarks.md). Which kernel a product takes follows from its shape alone, so every run and device takes the same.
"""

import functools
import importlib
import importlib.metadata
import inspect
from typing import Any, Literal

import torch
from torch import Tensor

from mtl.errors import UserError

TILE = (256, 192)
"""Rows and columns that a pair of warp groups makes of a product."""
LEAST = 1 << 36
"""Multiplications below which a product is left to torch: the host must launch it faster than the device makes it."""
FULL = 0.93
"""The share of all tiles' columns and rows, in whole rounds over the device, that a product must fill."""

_library: Any = torch.library.Library("mtl_products", "DEF")
_library.define("quack_mm(Tensor a, Tensor b) -> Tensor")


def choose(asked: Literal["auto", "torch", "quack"], device: torch.device, dtype: torch.dtype) -> int:
    """Say whether quack multiplies in a type, where it can and torch is not asked for: by the device's multiprocessors, or 0."""
    why = None if asked == "torch" else refuses(device, dtype)
    if asked == "quack" and why is not None:
        raise UserError(f"--products quack {why}. Take auto, or torch.")
    return 0 if asked == "torch" or why is not None else torch.cuda.get_device_properties(device).multi_processor_count


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why quack cannot multiply so, or None."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    major, minor = torch.cuda.get_device_capability(device) if nvidia else (0, 0)
    if major != 9:
        which = f"{device.type} of {major}.{minor}" if nvidia else device.type
        return f"needs an NVIDIA GPU of compute capability 9 (Hopper), and this run's device is {which}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    try:
        importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "needs the quack-kernels package, which flash-attn-4 brings: pip install flash-attn-4, for CUDA 13 'flash-attn-4[cu13]'"
    return problem()


@functools.cache
def problem() -> str | None:
    """Say why the package that is there cannot be used, or None: it is young, and what is called here may change. Loads it."""
    try:
        gemm, config = _package()
        _kernel(config)
    except Exception as error:
        return f"needs a quack-kernels as of 0.6.5; this one says {type(error).__name__}: {error}"
    missing = [name for name in ("A", "B", "out", "config") if name not in inspect.signature(gemm).parameters]
    return f"needs a quack-kernels as of 0.6.5; the gemm of this one has no {', '.join(missing)}" if missing else None


def multiply(units: int, a: Tensor, b: Tensor) -> Tensor:
    """Give a @ b of two matrices: by quack, without a derivative, where it is the faster one on a device of so many multiprocessors."""
    if not units or not wins(a.shape[0], b.shape[1], a.shape[1], units) or not (lies(a) and lies(b)):
        return a @ b
    op: Any = torch.ops.mtl_products.quack_mm
    return op(a, b)


def wins(rows: int, columns: int, inner: int, units: int, tile: tuple[int, int] = TILE) -> bool:
    """Tell whether quack's kernel is the faster one for a product on a device of so many multiprocessors."""
    rounds = -(-(-(-rows // tile[0]) * -(-columns // tile[1])) // units)
    return rows * columns * inner >= LEAST and rows * columns >= FULL * rounds * units * tile[0] * tile[1]


def lies(x: Tensor) -> bool:
    """Tell whether a 16-bit matrix lies by rows or columns, in multiples of 16 bytes, as the device's copies into a kernel ask."""
    sizes = (*x.shape, *(s for s in x.stride() if s != 1), x.storage_offset())
    return x.dtype in (torch.bfloat16, torch.float16) and 1 in x.stride() and all(n % 8 == 0 for n in sizes)


@functools.cache
def _package() -> tuple[Any, Any]:
    module = importlib.import_module("quack.gemm_interface")
    return module.gemm_tuned.fn, importlib.import_module("quack.gemm_config").GemmConfig


def _kernel(config: Any) -> Any:
    """Name the kernel: tiles side by side are made by neighbours on the device, which read the rows that they share once."""
    return config(tile_m=TILE[0], tile_n=TILE[1], pingpong=False, is_dynamic_persistent=False, device_capacity=9, cluster_m=1, cluster_n=2)


def launch(a: Tensor, b: Tensor) -> Tensor:
    """Run the package's kernel."""
    gemm, config = _package()
    out = a.new_empty(a.shape[0], b.shape[1])
    gemm(A=a, B=b, out=out, config=_kernel(config))
    return out


def _shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_library.impl("quack_mm", launch, "CUDA")
_library.impl("quack_mm", _shape, "Meta")
