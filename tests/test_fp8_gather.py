"""Weights gathered in 8 bits: half the bytes, the same bits, one all-reduce a step."""

from typing import Any

import pytest
import torch

from mtl.kernels import fp8
from tests.cases.fp8 import CONFIG
from tests.cases.fp8_gather import kernels
from tests.interpreter import interpret
from tests.ranks import Ranks
from tests.test_fp8 import draw

LAYER = 64 * (64 + 2 * 32 + 64 + 3 * 96)
TRIPS = 4
"""What a layer gathers: query, key and value; out; gate and up; down."""


@pytest.mark.parametrize("through", [torch.float32, torch.bfloat16])
def test_parts_are_rounded_to_what_the_whole_is(through: torch.dtype) -> None:
    """Over ranks by rows, and side by side: the bytes of the whole, brought to the type first, either way."""
    a, b = draw(0, 48, 5, 16) * 3, draw(1, 48, 32)
    whole = torch.cat([a.flatten(1), b], 1).to(through)
    scale = fp8.scale_for(whole)
    want = fp8.side(whole, known=scale)
    rows = torch.cat([fp8.side_by_side([a[i : i + 16].flatten(1), b[i : i + 16]], scale, through) for i in (0, 16, 32)])
    assert torch.equal(byte(rows), byte(want.plain.values))
    assert torch.equal(byte(fp8.turned(rows)), byte(want.turned.values)) and fp8.turned(rows).is_contiguous()


def byte(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def test_the_kernels_are_the_reference() -> None:
    """Under Triton's interpreter: parts that lie apart, side by side, and bytes turned over."""
    interpret("fp8_gather", "kernels('cpu')")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parts_have_the_same_bits_on_a_gpu() -> None:
    kernels("cuda")


CASES: list[Any] = [
    ("fsdp", 2, {}),
    ("fsdp", 4, {"engine": True}),
    ("hsdp", 4, {"remat": "every:2"}),
    ("fsdp", 2, {"remat": "selective", "engine": True}),
    ("fsdp_tensor", 4, {"remat": "gather"}),
    ("fsdp_tensor", 4, {"remat": "full"}),
    pytest.param("fsdp_tensor", 4, {"remat": "full", "how": "step"}, marks=pytest.mark.slow),
    pytest.param("fsdp_context_tensor", 8, {"remat": "every:2"}, marks=pytest.mark.slow),
    pytest.param("hsdp", 4, {"remat": "full"}, marks=pytest.mark.slow),
    ("fsdp", 2, {"how": "block", "remat": "full"}),
    pytest.param("fsdp", 2, {"how": "block"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("table", "world", "how"), CASES, ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else str(x))
def test_gradients_have_the_same_bits(ranks: Ranks, table: str, world: int, how: dict[str, Any]) -> None:
    found = ranks.run("tests.cases.fp8_gather:gradients", world, table=table, world=world, **how)
    assert found["same"] and found["nonzero"]
    eight, sixteen = found["eight"], found["sixteen"]
    assert eight["before"]["all_reduce max"] == 1 and eight["before"]["linalg_vector_norm"] == 7
    assert not [name for name in eight["before"] if "gather" in name]
    names = ("all_gather_into_tensor", "all_reduce sum", "all_reduce max", "reduce_scatter_tensor", "all_to_all_single", "mm")
    assert all(eight["times"].get(name) == sixteen["times"].get(name) for name in names), "the same collectives in a micro-batch"
    tensor = 2 if "tensor" in table else 1
    assert sixteen["gathered"] - eight["gathered"] == 2 * CONFIG.layers * LAYER // tensor, "a byte an element, in forward and in backward"
    if not how.get("engine"):
        assert eight["times"]["side_by_side"] == 2 * TRIPS * CONFIG.layers
    assert eight["times"]["turned"] >= TRIPS * CONFIG.layers
    assert "turned" not in sixteen["times"] and eight["times"]["rounded"] < sixteen["times"]["rounded"]


@pytest.mark.parametrize(
    "choices",
    [pytest.param({}, marks=pytest.mark.slow), {"micros": 2}, {"tuned": True}, {"offload": "optimizer", "micros": 2}],
    ids=str,
)
def test_a_step_has_one_more_all_reduce_and_the_same_state(ranks: Ranks, choices: dict[str, Any]) -> None:
    found = ranks.run("tests.cases.fp8_gather:steps", 2, table="fsdp", world=2, **choices)
    assert found["same"], "losses, norms, parameters and moments"
    eight, sixteen = (found[name]["times"] for name in ("eight", "sixteen"))
    assert eight["all_reduce max"] == 1 and "all_reduce max" not in sixteen, "not one more for more micro-batches"
    assert eight["all_reduce sum"] == sixteen["all_reduce sum"]
    saved = found["sixteen"]["gathered"] - found["eight"]["gathered"]
    if choices.get("tuned"):  # whose adapters are gathered too, in 16 bits; the first layer's gradient of its input is not asked for
        assert saved > CONFIG.layers * LAYER
    else:
        assert saved == 2 * CONFIG.layers * LAYER * choices.get("micros", 1)


@pytest.mark.parametrize(("table", "world"), [("zero1", 2), ("tensor", 2)])
def test_what_is_not_gathered_by_layers_finds_no_scales(ranks: Ranks, table: str, world: int) -> None:
    found = ranks.run("tests.cases.fp8_gather:steps", world, table=table, world=world)
    assert found["same"] and found["eight"]["times"] == found["sixteen"]["times"]


def test_scales_of_rows_are_found_after_the_gather(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.fp8_gather:steps", 2, table="fsdp", world=2, precision="fp8_rows")
    assert found["same"] and found["eight"]["times"] == found["sixteen"]["times"]


def test_an_evaluation_gathers_half_and_says_the_same(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.fp8_gather:entropy", 2, table="fsdp", world=2)
    assert found["same"]
    eight, sixteen = found["gathered"]
    assert sixteen - eight == 2 * CONFIG.layers * LAYER, "in each of two batches"


@pytest.mark.parametrize(
    ("remat", "engine"),
    [
        ("full", True),
        pytest.param("none", False, marks=pytest.mark.slow),
        pytest.param("none", True, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
    ],
)
def test_gathers_in_8_bits_start_ahead(ranks: Ranks, remat: str, engine: bool) -> None:
    default = (remat, engine) == ("full", True)  # pretended peers, and so half of the time: slow cases compare the numbers
    ask = ranks.capture if default else ranks.run
    found = ask("tests.cases.fp8_gather:graph", 2, table="fsdp", world=2, remat=remat, engine=engine)
    eight, sixteen = found["eight"], found["sixteen"]
    assert default or found["same"]
    assert eight["of 1"] == 2 * TRIPS * CONFIG.layers and "of 1" not in sixteen
    assert eight["of 2"] == 3 and sixteen["of 2"] == 3 + eight["of 1"], "the vocabulary travels as before"
    assert sixteen["bytes"] - eight["bytes"] == 2 * CONFIG.layers * LAYER
    assert eight["gathers"] == sixteen["gathers"] and eight["gather"] == sixteen["gather"] >= 0.8, "as many start ahead as in 16 bits"
    assert eight["in_flight"] == sixteen["in_flight"] and eight["reduced"] == sixteen["reduced"], "and no scale is found in the graph"
