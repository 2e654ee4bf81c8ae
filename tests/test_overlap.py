"""The overlap pass: gathers start before earlier products, sums are collected later, and the numbers stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtl.kernels import copy_engine
from mtl.runtime.overlap import DISTANCE
from tests.ranks import Ranks


@pytest.mark.parametrize(
    ("precision", "engine"),
    [
        pytest.param("fp64", False, id="sums"),
        pytest.param("bf16", False, id="exchanges", marks=pytest.mark.slow),
        pytest.param("bf16", True, id="engine"),
    ],
)
def test_gathers_start_ahead_and_sums_end_behind(ranks: Ranks, precision: str, engine: bool) -> None:
    found = ranks.run("tests.cases.overlap:distances", 2, precision=precision, engine=engine)
    plain, moved = found["plain"], found["overlap"]
    assert plain["gather"] == 0, "as traced, every gather is waited for before any product"
    assert moved["gather"] >= 0.8 and moved["scatter"] > plain["scatter"], found
    assert moved["gathers"] == plain["gathers"] > 15 and moved["scatters"] == plain["scatters"] > 8
    assert moved["in_flight"] <= 3, "no more than two gathers wait ahead"
    assert found["same"], "the moved graph gives bitwise the same result"


def test_sums_have_slots_for_all_that_are_under_way() -> None:
    """A sum is sent while so many before it are not collected: with a slot less it would wait for itself."""
    assert all(copy_engine.slots("sum", size)[0] > DISTANCE for size in (1, 1 << 32))


def test_the_kernels_beside_copy_engines_are_plain_sums_and_casts() -> None:
    """Under Triton's interpreter."""
    pytest.importorskip("triton", reason="needs Triton, whose interpreter runs the kernel")
    command = [sys.executable, "-c", "from tests.cases import engine_kernels; engine_kernels.check('cpu')"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_have_the_same_bits_on_a_gpu() -> None:
    from tests.cases import engine_kernels

    engine_kernels.check("cuda")
