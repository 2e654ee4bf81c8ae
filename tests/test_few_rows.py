"""Few rows times a weight: the kernel against exact products, and decoding that uses it against the full forward."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtl.kernels import few_rows
from tests.cases.generate import NEW
from tests.interpreter import interpret
from tests.ranks import Ranks

CASES = [
    (1, 256, 96, False, True, True), (1, 296, 50, True, True, False), (3, 1000, 33, False, False, True),
    (2, 2056, 34, True, False, True), (1, 264, 7, False, False, False),
]  # fmt: skip
"""Rows, inner size, columns, whether gated, whether after a norm, whether something is added: also sizes that no block divides."""


def check(case: tuple[int, int, int, bool, bool, bool], dtype: torch.dtype, device: str) -> None:
    """Compare the kernel with the product in float64: every number lies at most one rounding (and the sum's own error) away."""
    rows, inner, columns, gated, norm, add = case
    torch.manual_seed(0)

    def random(*of: int) -> Tensor:
        return torch.randn(of, device=device).to(dtype)

    x, w = random(rows, inner), (random(columns * (1 + gated), inner) * 0.1).t()
    scale, more = random(inner) if norm else None, random(rows, columns) if add else None
    got = few_rows.launch(x, w, scale, 1e-5, gated, more)
    exact = few_rows.plain(
        *(None if t is None else t.double() for t in (x, w, scale)), 1e-5, gated, None if more is None else more.double()
    )
    assert got.dtype == dtype and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 2e-5).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, (1, 4096, 6144, False, True, False), (1, 14336, 4096, False, False, True)])
def test_the_kernel_is_what_it_means(case: tuple[int, int, int, bool, bool, bool], dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


def test_the_kernel_is_what_it_means_without_a_gpu() -> None:
    interpret("few_rows_kernel", "check()")


@pytest.mark.parametrize(
    ("case", "sums"),
    [
        (("single", 1, "llama"), 2),
        (("single", 1, "qwen"), 2),
        (("tensor", 2, "llama"), 0),
        (("tensor", 4, "qwen"), 0),
        (("ddp", 2, "llama"), 2),
        pytest.param(("fsdp_ulysses_tensor", 2, "qwen"), 0, marks=pytest.mark.slow),
    ],
    ids=lambda c: "-".join(map(str, c)) if isinstance(c, tuple) else str(c),
)
def test_decode_in_few_kernels_equals_full_forward(ranks: Ranks, references: Path, case: tuple[str, int, str], sums: int) -> None:
    table, world, model = case
    path = references / f"generate-{model}.safetensors"
    if not path.exists():
        ranks.run("tests.cases.generate:reference", 1, model=model, path=str(path))
    found = ranks.run("tests.cases.generate:in_few_kernels", world, table=table, world=world, model=model, path=str(path))
    assert found["error"] < 1e-9, found
    assert found["products"] == NEW * 2 * 4, "two layers, each of four products"
    assert found["sums"] == NEW * 2 * sums, "what devices sum over cannot take the residual stream in"


@pytest.mark.parametrize("model", ["gpt", "falcon", "llama_tied", "fsdp"])
def test_other_layers_stay_as_they_are(ranks: Ranks, references: Path, model: str) -> None:
    table, world, model = ("fsdp", 2, "llama") if model == "fsdp" else ("single", 1, model)
    path = references / f"generate-{model}.safetensors"
    if not path.exists():
        ranks.run("tests.cases.generate:reference", 1, model=model, path=str(path))
    found = ranks.run("tests.cases.generate:in_few_kernels", world, table=table, world=world, model=model, path=str(path))
    assert found["error"] < 1e-9 and found["products"] == 0, found
