"""Products in 8 bits: how exact they are, that they are taken, and that a model trains with them."""

import pytest
import torch

from mtl.kernels import fp8
from mtl.precision import PRECISIONS
from mtl.runtime import process
from tests.ranks import Ranks


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_8_bits_hold_is_multiplied_exactly() -> None:
    a, b = (draw(i, 32, 32).sign() * 2.0 ** draw(i + 2, 32, 32).round().clamp(-2, 2) for i in (0, 1))
    assert torch.equal(fp8.matmul(a, b, torch.tensor(64.0), torch.tensor(64.0)), a @ b)


@pytest.mark.parametrize("sizes", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("type_b", [fp8.VALUES, fp8.GRADIENTS])
def test_the_error_is_that_of_the_format(sizes: float, type_b: torch.dtype) -> None:
    a, b = draw(0, 64, 256) * sizes, draw(1, 256, 48)
    got = fp8.matmul(a, b, fp8.scale_for(a), fp8.scale_for(b, type_b), type_b=type_b)
    error = (got - a @ b).norm() / (a @ b).norm()
    step = 2.0**-4 if type_b == fp8.VALUES else 2.0**-3  # half a unit in the last place of 3 or 2 bits
    assert 0.1 * step < error < step, "scaled to the format's range, whatever the size of the values"


def test_sizes_that_do_not_fit() -> None:
    assert fp8.fits(16, 4096) and not fp8.fits(16, 4095)


def test_all_products_but_the_heads_are_rounded(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.fp8:rounded", 1)
    assert found["bf16"] == 0
    assert found["fp8"] == found["products"] * 3 * 2, "three products of each projection, both sides of each"


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
