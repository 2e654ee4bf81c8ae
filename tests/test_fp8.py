"""Products in 8 bits: how exact they are, that they are taken, and that a model trains with them."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from mtl.kernels import fp8
from mtl.ops.linear import linear
from mtl.precision import PRECISIONS
from mtl.runtime import process
from mtl.sharding.parallel import Parallel
from tests.cases.fp8 import CONFIG
from tests.interpreter import interpret
from tests.ranks import Ranks


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_8_bits_hold_is_multiplied_exactly() -> None:
    a, b = (draw(i, 32, 32).sign() * 2.0 ** draw(i + 2, 32, 32).round().clamp(-2, 2) for i in (0, 1))
    sides = fp8.side(a, known=torch.tensor(64.0)), fp8.side(b, known=torch.tensor(64.0))
    assert torch.equal(multiplied(*sides), a @ b)


def multiplied(a: fp8.Side, b: fp8.Side) -> torch.Tensor:
    return fp8.multiply(a.plain, b.turned, torch.float32)


@pytest.mark.parametrize("sizes", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("type_b", [fp8.VALUES, fp8.GRADIENTS])
def test_the_error_is_that_of_the_format(sizes: float, type_b: torch.dtype) -> None:
    a, b = draw(0, 64, 256) * sizes, draw(1, 256, 48)
    got = multiplied(fp8.side(a), fp8.side(b, dtype=type_b))
    error = (got - a @ b).norm() / (a @ b).norm()
    step = 2.0**-4 if type_b == fp8.VALUES else 2.0**-3  # half a unit in the last place of 3 or 2 bits
    assert 0.1 * step < error < step, "scaled to the format's range, whatever the size of the values"


UNIT = 2.0**-4
"""Half a unit in the last place of e4m3: how far a number is from what is kept of it, for numbers of 1."""


def spread_out() -> tuple[torch.Tensor, ...]:
    """Give sides whose rows and columns differ by orders of magnitude, in float64, and these magnitudes."""
    rows, columns = 100.0 ** draw(2, 32, 1).double(), 100.0 ** draw(3, 1, 48).double()
    return draw(0, 32, 256).double() * rows, draw(1, 256, 48).double() * columns, rows, columns


def test_each_row_and_column_has_its_scale() -> None:
    """Every number is that of its row alone times its column alone, in 8 bits with one scale a side."""
    a, b, *_ = (x.float() for x in spread_out())
    got = multiplied(fp8.side(a, "rows"), fp8.side(b, "rows"))
    for i, j in ((0, 0), (3, 7), (31, 47), (8, 1)):
        alone = multiplied(fp8.side(a[i : i + 1]), fp8.side(b[:, j : j + 1]))
        assert got[i, j].item() == pytest.approx(alone.item(), rel=1e-6)


def test_rows_are_as_exact_as_the_format_whatever_their_sizes() -> None:
    """Each number is within what e4m3 may lose of its row and column, and all together lose what those of one size do.

    The sizes are taken out before errors are summed: else one column is all of a row, and where that number happens to be small beside
    what it is summed from, its error is large beside it, in any format.
    """
    a, b, rows, columns = spread_out()

    def loss(scales: fp8.Scales) -> torch.Tensor:
        return multiplied(fp8.side(a.float(), scales), fp8.side(b.float(), scales)).double() - a @ b

    def lost(x: torch.Tensor, dim: int) -> torch.Tensor:  # a number below the smallest normal one loses half of the smallest step
        return torch.maximum(UNIT * x.abs(), x.abs().amax(dim, keepdim=True) * 2.0**-10 / 448)

    most = a.abs() @ lost(b, 0) + lost(a, 1) @ b.abs() + lost(a, 1) @ lost(b, 0)
    assert (loss("rows").abs() <= most * (1 + 1e-5)).all()
    errors = {name: ((loss(name) / rows / columns).norm() / (a @ b / rows / columns).norm()).item() for name in ("tensor", "rows")}
    same = draw(0, 32, 256), draw(1, 256, 48)
    even = ((multiplied(*map(fp8.side, same)) - same[0] @ same[1]).norm() / (same[0] @ same[1]).norm()).item()
    assert errors["rows"] == pytest.approx(even, rel=0.1) and errors["rows"] < UNIT
    assert errors["tensor"] > 2 * errors["rows"], "one scale for all loses the small rows"


@pytest.mark.parametrize("scales", [None, "tensor", "rows"])
@pytest.mark.parametrize("spelling", ["BSD,DF->BSF", "BSD,FD->BSF"])
def test_gradients_against_float64(one: Callable[..., Parallel], spelling: str, scales: fp8.Scales | None) -> None:
    """A product and its two gradients lose what the format does: e4m3 both sides, or e5m2 for the gradient where it has one scale."""
    par = dataclasses.replace(one(embed=96, mlp=160, batch=2, seq=64), fp8=scales)
    x, grad = draw(0, 2, 64, 96), draw(2, 2, 64, 160)
    w = draw(1, 96, 160) if spelling.split(",")[1][0] == "D" else draw(1, 160, 96)

    def results(kind: torch.dtype, par: Parallel) -> list[torch.Tensor]:
        leaves = [y.to(kind).requires_grad_() for y in (x, w)]
        out = linear(par, spelling, *leaves)
        return [y.double() for y in (out, *torch.autograd.grad(out, leaves, grad.to(kind)))]

    exact = results(torch.float64, dataclasses.replace(par, fp8=None))
    errors = [((got - want).norm() / want.norm()).item() for got, want in zip(results(torch.float32, par), exact, strict=True)]
    if scales is None:
        assert max(errors) < 1e-6
        return
    # Rounding by up to half a unit loses u / sqrt(3) of a number of 1 and less of larger ones: 0.026 in e4m3, twice that in e5m2.
    e4m3, e5m2 = 0.026, 0.052
    want = [math.hypot(e4m3, e4m3), *[math.hypot(e4m3, e5m2 if scales == "tensor" else e4m3)] * 2]
    assert errors == pytest.approx(want, rel=0.1)


def test_sizes_that_do_not_fit() -> None:
    assert fp8.fits(16, 4096) and not fp8.fits(16, 4095)


def test_all_products_but_the_heads_are_rounded(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.fp8:rounded", 1)
    sides = found["products"] * 3 * 2
    assert found["bf16"] == {} and found["fp8"] == {"tensor": sides} and found["fp8_rows"] == {"rows": sides}, "three products of each"


def test_nothing_is_scaled_or_rounded_twice(ranks: Ranks) -> None:
    """Forward finds a scale of each side, and rounds both; backward finds the gradient's, and rounds this both ways at once."""
    found, none = (ranks.run("tests.cases.fp8:operations", 1, precision=name) for name in ("fp8", "bf16"))
    products = CONFIG.layers * 4
    assert found["amax"] - none["amax"] == 2 * products * 3, "of each row first, then of these"
    assert found["rounded"] == products * (2 + 3) and "rounded" not in none
    again = ranks.run("tests.cases.fp8:operations", 1, precision="fp8", remat="full")
    assert again["rounded"] > found["rounded"] and again["amax"] > found["amax"], "recompute rounds again"


def test_both_ways_are_the_same_numbers() -> None:
    x = draw(0, 48, 32)
    made = fp8.side(x)
    plain, turned = (way.values.float() for way in made)
    assert torch.equal(plain, turned.t()) and made.turned.values.is_contiguous()
    assert torch.equal(plain, (x * made.plain.scale).to(fp8.VALUES).float())
    assert plain.abs().max() == torch.finfo(fp8.VALUES).max
    for want, kept in ((made.plain, 0), (made.turned, 1)):
        alone = fp8.side(x, plain=kept == 0, turned=kept == 1)
        assert torch.equal(alone[kept].values.float(), want.values.float()) and alone[1 - kept].values.numel() == 0


def test_the_kernel_is_the_reference() -> None:
    """Under Triton's interpreter: every layout, tile, scale and limit."""
    interpret("fp8", "kernel()")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [fp8.VALUES, fp8.GRADIENTS])
def test_the_kernel_rounds_to_the_same_bits(dtype: torch.dtype) -> None:
    x = (draw(0, 1040, 2064) * draw(1, 1040, 2064).exp() ** 3).bfloat16().cuda()
    x[5, 7] = float("nan")
    scale = torch.tensor(1000.0, device="cuda")
    scales = (scale * draw(2, 1040, 1).exp().cuda(), scale * draw(3, 1, 2064).exp().cuda())
    for across, down in ((scale, scale), (scale, None), (None, scale), scales):
        for got, want in zip(fp8.rounded(x, across, down, dtype), fp8.plain(x, across, down, dtype), strict=True):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize(
    ("precision", "tables"),
    [
        ("fp8", ("tensor",)),
        ("fp8_rows", ()),
        *(pytest.param(name, ("fsdp", "tensor"), marks=pytest.mark.slow) for name in ("fp8", "fp8_rows")),
    ],
    ids=["fp8", "fp8_rows", "fp8-meshes", "fp8_rows-meshes"],
)
def test_a_model_trains_as_in_16_bits(ranks: Ranks, precision: str, tables: tuple[str, ...]) -> None:
    found = ranks.run("tests.cases.fp8:losses", 1, precisions=["bf16", precision])
    exact, rounded = torch.tensor(found["bf16"]), torch.tensor(found[precision])
    assert exact[-1] < exact[0] - 1, "the reference learns"
    assert not torch.equal(exact, rounded)
    assert ((exact - rounded).abs() / exact[0]).max() < 0.02, "the task is learnt to nothing, so the gap is held against the first loss"
    for table in tables:
        remat = "gather" if table == "tensor" else "none"
        spread = torch.tensor(ranks.run("tests.cases.fp8:losses", 2, precisions=[precision], table=table, remat=remat)[precision])
        assert ((spread - exact).abs() / exact[0]).max() < 0.02, "each device scales its own parts, so only 16 bits are the same everywhere"
        if table == "fsdp":
            assert ((spread - rounded).abs() / exact[0]).max() < 0.02, "weights are whole here, and so are their scales"


def test_tf32_is_a_setting_of_the_products() -> None:
    """It says how float32 products run on NVIDIA GPUs, and leaves other precisions exact."""
    try:
        process.prepare_environment(tf32=PRECISIONS["tf32"].tf32)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        process.prepare_environment(tf32=PRECISIONS["fp32"].tf32)
    assert torch.get_float32_matmul_precision() == "highest"
