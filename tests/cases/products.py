"""A stand-in for the package whose kernels multiply, and a training run through it on ranks."""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mtl.kernels import products
from tests.cases import train


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

    def gemm(self, *, A: Tensor, B: Tensor, out: Tensor, config: Config) -> None:
        """Multiply, and note the kernel."""
        self.calls.append(config)
        torch.mm(A, B, out=out)


@contextlib.contextmanager
def standing_in() -> Generator[Package]:
    """Let the stand-in multiply on the CPU whatever is asked of the package."""
    found = Package()
    with contextlib.ExitStack() as stack:
        for name, value in (("_package", lambda: (found.gemm, Config)), ("wins", lambda *_: True), ("lies", lambda _: True)):
            stack.enter_context(mock.patch.object(products, name, value))
        library = stack.enter_context(torch.library._scoped_library("mtl_products", "IMPL"))  # type: ignore[attr-defined]
        library.impl("quack_mm", products.launch, "CPU")
        yield found


def parity(**case: Any) -> dict[str, Any]:
    """Compare training on a mesh with one device, as `train.parity`, and count the products."""
    real = train.parallel
    with standing_in() as found, mock.patch.object(train, "parallel", lambda *args: replace(real(*args), quack=132)):
        return train.parity(**case) | {"products": len(found.calls)}
