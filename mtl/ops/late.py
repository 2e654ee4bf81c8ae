"""Order for a compiler that cuts forward from backward: what is made of saved values alone it would make ahead, and keep."""

from torch import Tensor


def after(x: Tensor, grad: Tensor) -> Tensor:
    """Give the same values, but made of a gradient too, so that they and all that is made of them belong to backward."""
    return x - grad.flatten()[:1].isnan().to(x.dtype) * 0.0
