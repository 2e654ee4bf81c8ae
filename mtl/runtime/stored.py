"""A value that a compiler keeps in memory. Left to itself it keeps the parts of a sum, and adds them up anew wherever that is read.

So the residual stream was there every other layer, and where a norm's backward had more than four parts to read, its normalized input was
kept too, in float32. On an H200, 4 layers of the 8B shape at 2 x 8192 took 34.70 GiB, and take 34.08.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_library: Any = torch.library.Library("mtl_memory", "DEF")
_library.define("stored(Tensor x) -> Tensor")
for _key in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("stored", torch.clone, _key)
_library.impl("stored", torch.empty_like, "Meta")


@functools.cache
def teach_inductor() -> None:
    """Tell inductor what the operation means: a buffer of its own. Loading inductor takes a second that only who compiles should spend."""
    lowering: Any = importlib.import_module("torch._inductor.lowering")
    view: Any = importlib.import_module("torch._inductor.ir").BaseView

    def realize(x: Any) -> Any:
        if isinstance(x.data, view) and x.get_numel() != x.data.unwrap_view().get_numel():
            x = lowering.clone(x)  # a part, which would keep the whole alive
        x.realize()
        return x

    lowering.register_lowering(torch.ops.mtl_memory.stored, type_promotion_kind=None)(realize)


class _Stored(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gradient: bool) -> Tensor:
        return torch.ops.mtl_memory.stored(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.gradient = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return stored(grad) if ctx.gradient else grad, None


def stored(x: Tensor, gradient: bool = False) -> Tensor:
    """Give the same values, which a compiled graph holds in memory; ``gradient``: theirs too. Without a compiler this is a copy."""
    out = _Stored.apply(x, gradient)
    assert isinstance(out, Tensor)
    return out


class _GradientStored(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return stored(grad)


def gradient_stored(x: Tensor) -> Tensor:
    """Give the same tensor, whose gradient a compiled graph holds in memory, as one sum: for what is used in several places.

    Without a compiler that gradient is copied.
    """
    out = _GradientStored.apply(x)
    assert isinstance(out, Tensor)
    return out
