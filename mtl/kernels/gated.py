"""Products with a gate inside, by quack's kernels: forward's also makes activation(gate) x up, backward's also the derivative of that.

Gate's and up's columns take turns, so that both of a pair lie in one thread's registers. No kernel reads again what a product wrote in
order to apply the activation (docs/performance.md).
"""

import functools
import importlib
import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.kernels import products

KINDS = {"swiglu": ("swiglu", F.silu), "geglu_tanh": ("geglu", functools.partial(F.gelu, approximate="tanh")), "reglu": ("reglu", F.relu)}
"""The activations that the kernels know, by mtl's names: the package's name, and what is made of the gate."""
BACK = (128, 192)
"""Rows and columns that a warp group makes in backward, where more is read and written beside a product: two warp groups take turns."""

_library: Any = torch.library.Library("mtl_products", "FRAGMENT")
_library.define("quack_mm_gated(Tensor x, Tensor w, str kind) -> (Tensor, Tensor)")
_library.define("quack_mm_gated_back(Tensor grad, Tensor w, Tensor pairs, str kind) -> (Tensor, Tensor)")


def forward(x: Tensor, w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Give x @ w, in whose columns gate and up take turns, and activation(gate) x up; without a derivative."""
    return torch.ops.mtl_products.quack_mm_gated(x, w, kind)  # pyright: ignore


def backward(grad: Tensor, w: Tensor, pairs: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Give the gradient of ``pairs``, what `forward` gave first, from that of (what it gave second) @ w.t(); and give that second again."""
    return torch.ops.mtl_products.quack_mm_gated_back(grad, w, pairs, kind)  # pyright: ignore


def fits(units: int, kind: str, rows: int, inner: int, columns: int) -> bool:
    """Tell whether both kernels are the faster ones for an MLP on a device of so many multiprocessors."""
    if kind not in KINDS or any(n % 8 for n in (rows, inner, columns)):
        return False
    return products.wins(rows, 2 * columns, inner, units) and products.wins(rows, columns, inner, units, BACK)


@functools.cache
def there() -> bool:
    """Tell whether the package has them, as they are called here; it refuses them where it does not lie in a folder of packages."""
    try:
        importlib.import_module("quack.epilogue.library")
        run, back, _, _ = _package()
    except Exception as error:
        warnings.warn(f"MLPs' gates stay outside quack's products: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        return False
    called = ((run, "A B activation preact_out postact_out"), (back, "A B PreAct activation dx_out postact_out dynamic_scheduler"))
    return all({*names.split(), "tuned", "config"} <= {*inspect.signature(fn).parameters} for fn, names in called)


@functools.cache
def _package() -> tuple[Any, Any, Any, Any]:
    """Give the package's two functions and what each kernel is: the package tells kernels apart by the object that names them."""
    module, config = importlib.import_module("quack.gemm_interface"), importlib.import_module("quack.gemm_config").GemmConfig
    usual = {"is_dynamic_persistent": False, "device_capacity": 9, "cluster_m": 2, "cluster_n": 1}
    front = config(tile_m=products.TILE[0], tile_n=products.TILE[1], pingpong=False, **usual)
    return module.gemm_gated, module.gemm_dgated, front, config(tile_m=BACK[0], tile_n=BACK[1], pingpong=True, **usual)


def launch(x: Tensor, w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Run the package's kernel of forward."""
    run, _, kernel, _ = _package()
    pairs, out = _shape(x, w, kind)
    x = x if products.lies(x) else x.contiguous()
    run(A=x, B=w, activation=KINDS[kind][0], preact_out=pairs, postact_out=out, tuned=False, config=kernel)
    return pairs, out


def launch_back(grad: Tensor, w: Tensor, pairs: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Run the package's kernel of backward."""
    _, run, _, kernel = _package()
    d_pairs, out = _shape_back(grad, w, pairs, kind)
    grad = grad if products.lies(grad) else grad.contiguous()
    how: dict[str, Any] = {"activation": KINDS[kind][0], "dynamic_scheduler": False, "tuned": False, "config": kernel}
    run(A=grad, B=w, PreAct=pairs, dx_out=d_pairs, postact_out=out, **how)
    return d_pairs, out


def _shape(x: Tensor, w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w.shape[1]), x.new_empty(x.shape[0], w.shape[1] // 2)


def _shape_back(grad: Tensor, w: Tensor, pairs: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pairs), grad.new_empty(grad.shape[0], w.shape[1])


_library.impl("quack_mm_gated", launch, "CUDA")
_library.impl("quack_mm_gated", _shape, "Meta")
_library.impl("quack_mm_gated_back", launch_back, "CUDA")
_library.impl("quack_mm_gated_back", _shape_back, "Meta")
