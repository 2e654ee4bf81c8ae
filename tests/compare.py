"""Compare what two ways of computing gave, against the size of the larger numbers in it."""

from typing import Any

from torch import Tensor

from mtl import tree


def close(got: Any, want: Any, bound: float = 1e-12) -> None:
    """Check trees of tensors leaf by leaf: same shapes and types, no error above ``bound`` times the leaf's largest number."""
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        error, size = (a - b).abs().max().item(), b.abs().max().item()
        assert 0.0 < size < float("inf"), "nothing to compare"
        assert error <= bound * size, f"error {error:.3g}, bound {bound:.3g} x {size:.3g}"


def same(got: Any, want: Any) -> bool:
    """Tell whether two trees hold the same bits (NaN equals NaN)."""
    pairs = list(zip(tree.leaves(got), tree.leaves(want), strict=True))
    return all(a.shape == b.shape and a.dtype == b.dtype and _bytes(a) == _bytes(b) for a, b in pairs)


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().numpy().tobytes()
