"""A stand-in for the package whose kernels multiply, with a gate inside or not, and a training run through it on ranks."""

import contextlib
import functools
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.kernels import gated, products
from tests.cases import train

ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "swiglu": (F.silu, torch.ops.aten.silu_backward),
    "geglu": (functools.partial(F.gelu, approximate="tanh"), functools.partial(torch.ops.aten.gelu_backward, approximate="tanh")),
    "reglu": (F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
}
"""By the package's names: what is made of the gate, and its derivative."""


@dataclass
class Config:
    """How the package names a kernel."""

    tile_m: int
    tile_n: int
    pingpong: bool
    is_dynamic_persistent: bool
    device_capacity: int
    cluster_m: int
    cluster_n: int


class Package:
    """The package's product, spelled out."""

    def __init__(self) -> None:
        self.calls: list[Config] = []
        self.gates: list[Config] = []

    def gemm(self, *, A: Tensor, B: Tensor, out: Tensor, config: Config) -> None:
        """Multiply, and note the kernel."""
        self.calls.append(config)
        torch.mm(A, B, out=out)

    def gemm_gated(
        self, *, A: Tensor, B: Tensor, activation: str, preact_out: Tensor, postact_out: Tensor, tuned: bool, config: Config
    ) -> None:
        """Multiply by gate and up, whose columns take turns, and give their MLP's inside."""
        assert not tuned
        self.gates.append(config)
        torch.mm(A, B, out=preact_out)
        gate, up = preact_out[:, ::2], preact_out[:, 1::2]
        postact_out.copy_(ACTIVATIONS[activation][0](gate) * up)

    def gemm_dgated(
        self, *, A: Tensor, B: Tensor, PreAct: Tensor, activation: str, dx_out: Tensor, postact_out: Tensor, dynamic_scheduler: bool,
        tuned: bool, config: Config,
    ) -> None:  # fmt: skip
        """Go back through the next product and the MLP's inside."""
        assert not tuned and not dynamic_scheduler
        self.gates.append(config)
        gate, up = PreAct[:, ::2], PreAct[:, 1::2]
        fn, back = ACTIVATIONS[activation]
        grad = A @ B
        postact_out.copy_(fn(gate) * up)
        dx_out[:, ::2].copy_(back(grad * up, gate))
        dx_out[:, 1::2].copy_(grad * fn(gate))


@contextlib.contextmanager
def standing_in() -> Generator[Package]:
    """Let the stand-in multiply on the CPU whatever is asked of the package."""
    found = Package()
    with contextlib.ExitStack() as stack:
        for name, value in (("_package", lambda: (found.gemm, Config)), ("wins", lambda *_: True), ("lies", lambda _: True)):
            stack.enter_context(mock.patch.object(products, name, value))
        kernels = (found.gemm_gated, found.gemm_dgated, Config(256, 192, False, False, 9, 2, 1), Config(128, 192, True, False, 9, 2, 1))
        stack.enter_context(mock.patch.object(gated, "_package", lambda: kernels))
        stack.enter_context(mock.patch.object(gated, "fits", lambda units, kind, *sizes: kind in gated.KINDS))
        library = stack.enter_context(torch.library._scoped_library("mtl_products", "IMPL"))  # type: ignore[attr-defined]
        library.impl("quack_mm", products.launch, "CPU")
        library.impl("quack_mm_gated", gated.launch, "CPU")
        library.impl("quack_mm_gated_back", gated.launch_back, "CPU")
        yield found


def parity(gates: bool, **case: Any) -> dict[str, Any]:
    """Compare training on a mesh with one device, as `train.parity`, and count the products, and those with a gate inside."""
    real = train.parallel
    with standing_in() as found, mock.patch.object(train, "parallel", lambda *args: replace(real(*args), quack=132, gated=gates)):
        return train.parity(**case) | {"products": len(found.calls), "gates": len(found.gates)}
