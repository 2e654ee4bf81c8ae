"""Products in 8 bits: how exact they are, that they are taken, and that a model trains with them."""

import os
import subprocess
import sys

import pytest
import torch

from mtl.kernels import fp8
from mtl.precision import PRECISIONS
from mtl.runtime import process
from tests.cases.fp8 import CONFIG
from tests.ranks import Ranks
from tests.test_pretrain import ROOT


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_8_bits_hold_is_multiplied_exactly() -> None:
    a, b = (draw(i, 32, 32).sign() * 2.0 ** draw(i + 2, 32, 32).round().clamp(-2, 2) for i in (0, 1))
    sides = fp8.side(a, torch.tensor(64.0)), fp8.side(b, torch.tensor(64.0))
    assert torch.equal(multiplied(*sides), a @ b)


def multiplied(a: fp8.Side, b: fp8.Side) -> torch.Tensor:
    return fp8.multiply(a.plain, b.turned, a.scale, b.scale, torch.float32)


@pytest.mark.parametrize("sizes", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("type_b", [fp8.VALUES, fp8.GRADIENTS])
def test_the_error_is_that_of_the_format(sizes: float, type_b: torch.dtype) -> None:
    a, b = draw(0, 64, 256) * sizes, draw(1, 256, 48)
    got = multiplied(fp8.side(a), fp8.side(b, dtype=type_b))
    error = (got - a @ b).norm() / (a @ b).norm()
    step = 2.0**-4 if type_b == fp8.VALUES else 2.0**-3  # half a unit in the last place of 3 or 2 bits
    assert 0.1 * step < error < step, "scaled to the format's range, whatever the size of the values"


def test_sizes_that_do_not_fit() -> None:
    assert fp8.fits(16, 4096) and not fp8.fits(16, 4095)


def test_all_products_but_the_heads_are_rounded(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.fp8:rounded", 1)
    assert found["bf16"] == 0
    assert found["fp8"] == found["products"] * 3, "three products of each projection"


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
    assert torch.equal(made.plain.float(), made.turned.float().t()) and made.turned.is_contiguous()
    assert torch.equal(made.plain.float(), (x * made.scale).to(fp8.VALUES).float())
    assert made.plain.float().abs().max() == torch.finfo(fp8.VALUES).max
    for plain, turned in ((True, False), (False, True)):
        alone = fp8.side(x, plain=plain, turned=turned)
        kept, empty = (alone.plain, alone.turned) if plain else (alone.turned, alone.plain)
        assert torch.equal(kept.float(), (made.plain if plain else made.turned).float()) and empty.numel() == 0


def test_the_kernel_is_the_reference() -> None:
    """Under Triton's interpreter: every layout, tile, scale and limit."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "from tests.cases import fp8; fp8.kernel()"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})


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


def test_a_model_trains_as_in_16_bits(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.fp8:losses", 1)
    exact, rounded = torch.tensor(found["bf16"]), torch.tensor(found["fp8"])
    assert exact[-1] < exact[0] - 1, "the reference learns"
    assert not torch.equal(exact, rounded)
    assert ((exact - rounded).abs() / exact[0]).max() < 0.02, "the task is learnt to nothing, so the gap is held against the first loss"
    spread = torch.tensor(ranks.run("tests.cases.fp8:losses", 2, table="fsdp")["fp8"])
    assert ((spread - rounded).abs() / exact[0]).max() < 0.02


def test_tf32_is_a_setting_of_the_products() -> None:
    """It says how float32 products run on NVIDIA GPUs, and leaves other precisions exact."""
    try:
        process.prepare_environment(tf32=PRECISIONS["tf32"].tf32)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        process.prepare_environment(tf32=PRECISIONS["fp32"].tf32)
    assert torch.get_float32_matmul_precision() == "highest"
