"""Query, key and value out of one product, turned: equal to taking them apart and turning each, both ways."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad

from mtl.ops.heads import turned_apart
from mtl.ops.rotary import rotate
from tests.interpreter import interpret

HEADS, KV, SIZE = 4, 2, 6


def apart(y: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> tuple[Tensor, ...]:
    q, k, v = y.unflatten(-1, (-1, SIZE)).split([HEADS, KV, KV], -2)
    return rotate(q, cos, sin, pairs), rotate(k, cos, sin, pairs), v


def given() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.randn(2, 3, (HEADS + 2 * KV) * SIZE, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 2, 3, SIZE // 2, dtype=torch.float64)
    return y, cos, sin


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_one_pass_gives_what_separate_operations_give(pairs: str) -> None:
    y, cos, sin = given()
    found, want = turned_apart(y, cos, sin, KV, pairs), apart(y, cos, sin, pairs)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, want, strict=True))

    def total(y: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        return sum((part.sin() * (i + 1)).sum() for i, part in enumerate(parts)) * torch.ones(())

    mine = grad(lambda y: total(y, turned_apart(y, cos, sin, KV, pairs)))(y)
    theirs = grad(lambda y: total(y, apart(y, cos, sin, pairs)))(y)
    torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)
    assert gradcheck(lambda y: turned_apart(y, cos, sin, KV, pairs), (y,))
    assert gradgradcheck(lambda y: turned_apart(y, cos, sin, KV, pairs)[0].square(), (y,))


def test_the_kernel_is_the_same_under_tritons_interpreter() -> None:
    interpret("heads_kernels", "check('cpu')")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_is_the_same_on_a_gpu() -> None:
    from tests.cases import heads_kernels

    heads_kernels.check("cuda")
