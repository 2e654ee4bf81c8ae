"""Tensor-parallel products in pieces: the same numbers as collectives and whole products give, and none of either left in the graph."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import sharding_rules
from experiments import tensor_overlap
from experiments.presets import PRESETS
from experiments.settings import TensorSettings
from mtl.errors import UserError
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import MeshShape
from tests.ranks import Ranks
from tests.test_graphs import LAYERS, TRIPS, WEIGHTS

COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all")
PIECES = ("gather_product", "gather_rows", "product_send", "product_take")


@pytest.mark.parametrize(("world", "batch", "dtype"), [(2, 1, "float64"), (2, 3, "float64"), (4, 2, "float64"), (8, 2, "float32")])
def test_pieces_give_what_collectives_give(ranks: Ranks, world: int, batch: int, dtype: str) -> None:
    found = ranks.run("tests.cases.piecewise:kernels", world, dtype=dtype, batch=batch)
    assert found.pop("left") == 0, "a sum that was taken is forgotten"
    assert max(found.values()) < 30 * torch.finfo(getattr(torch, dtype)).eps, found


@pytest.mark.parametrize("world", [2, 4])
def test_sums_of_16_bits_are_made_in_float32_and_rounded_once(ranks: Ranks, world: int) -> None:
    """The very bits of the exchange they stand for: more members, and sums in 16 bits would differ."""
    found = ranks.run("tests.cases.piecewise:kernels", world, dtype="bfloat16", batch=2)
    assert found["sum"] == found["doubled"] == found["gathered"] == 0.0, found


def test_derivatives_of_derivatives_go_through_pieces(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.piecewise:second_derivatives", 2)
    assert len(found) == 8 and max(found.values()) < 1e-14, found


@pytest.mark.parametrize(("table", "world"), [("tensor", 2), ("fsdp_tensor", 4)])
def test_adapters_train_beside_products_in_pieces(ranks: Ranks, references: Path, table: str, world: int) -> None:
    path = references / "lora-llama-0.0.safetensors"
    if not path.exists():
        ranks.run("tests.cases.lora:reference", 1, model="llama", path=str(path))
    found = ranks.run("tests.cases.lora:parity", world, table=table, world=world, model="llama", path=str(path), how="none+pieces")
    assert found["error"] < 1e-9, found


def counted(ranks: Ranks, piecewise: bool, table: str = "tensor", world: int = 2, **choices: Any) -> dict[str, int]:
    """Count operations in the graph of one micro-batch's gradient."""
    return ranks.capture("tests.cases.graphs:counts", world, table=table, world=world, piecewise=piecewise, **choices)


def test_layers_in_pieces_have_no_exposed_collective_and_no_whole_product_beside_one(ranks: Ranks) -> None:
    on, off = (counted(ranks, piecewise) for piecewise in (True, False))
    assert not any(off[kind] for kind in PIECES), "switched off, nothing is in pieces"
    assert [off[kind] for kind in COLLECTIVES] == [2 * (2 * LAYERS + 1), 2 * (2 * LAYERS + 1), 0]
    assert [on[kind] for kind in COLLECTIVES] == [2, 2, 0], "the embedding's and the head's are left"
    # Forward gathers before two products and sums after two; backward transposes each.
    assert [on[kind] for kind in PIECES] == [4 * LAYERS, 0, 4 * LAYERS, 4 * LAYERS]
    assert off["mm"] == 3 * (WEIGHTS * LAYERS + 1), "weights in the type that they are used in are multiplied as they lie"
    assert on["mm"] == 3 * (TRIPS * LAYERS + 1) - 8 * LAYERS, "those that share an input are one; two of three are pieces"


def test_pieces_keep_what_is_to_be_computed_or_gathered_again(ranks: Ranks) -> None:
    plain, parts, full = (counted(ranks, True, remat=remat) for remat in ("none", "gather", "full"))
    assert parts["gather_rows"] == 2 * LAYERS and plain["gather_rows"] == 0, "kept in parts, inputs are gathered again"
    assert {k: v for k, v in parts.items() if k != "gather_rows"} == {k: v for k, v in plain.items() if k != "gather_rows"}
    assert plain["gather_product"] + LAYERS < full["gather_product"] <= plain["gather_product"] + 2 * LAYERS


def test_weights_at_rest_in_parts_are_gathered_as_before(ranks: Ranks) -> None:
    on, off = (counted(ranks, piecewise, "fsdp_tensor", 4) for piecewise in (True, False))
    assert on["all_gather"] == off["all_gather"] - 4 * LAYERS and on["reduce_scatter"] == off["reduce_scatter"] - 4 * LAYERS


def test_nothing_is_in_pieces_in_8_bits(ranks: Ranks) -> None:
    found = counted(ranks, True, fp8="tensor")
    assert not any(found[kind] for kind in PIECES) and found["all_gather"] == 2 * (2 * LAYERS + 1)


@pytest.mark.parametrize(
    ("mesh", "rules", "precision", "engine", "why"),
    [
        (MeshShape(fsdp=2), "fsdp", "bf16", True, "mesh.tensor is 1"),
        (MeshShape(tensor=2, pipe=2), "tensor", "bf16", True, "mesh.pipe"),
        (MeshShape(tensor=2), "tensor", "fp8", True, "8 bits"),
        (MeshShape(tensor=2), "tensor", "bf16", False, "copy engines"),
        (MeshShape(tensor=2), "whole", "bf16", True, "residual_seq"),
    ],
)
def test_what_cannot_be_in_pieces_is_refused(mesh: MeshShape, rules: str, precision: str, engine: bool, why: str, tmp_path: Path) -> None:
    if rules == "whole":
        rules = str(tmp_path / "whole.py")
        Path(rules).write_text('"""No sequence parallelism."""\n\nBASE = "tensor"\nACT = {"residual_seq": ()}\n')
    setup = dataclasses.replace(PRESETS["tiny"], tensor=TensorSettings("on"))
    with pytest.raises(UserError, match=rf"tensor\.overlap is on.*{why}"):
        tensor_overlap.takes_pieces(setup, sharding_rules.load(rules), mesh, PRECISIONS[precision], engine)
    left_alone = dataclasses.replace(setup, tensor=TensorSettings("auto"))
    assert not tensor_overlap.takes_pieces(left_alone, sharding_rules.load(rules), mesh, PRECISIONS[precision], engine)


def test_pieces_are_taken_where_asked_and_where_copy_engines_serve() -> None:
    rules, shape, bf16 = sharding_rules.load("tensor"), MeshShape(tensor=2), PRECISIONS["bf16"]
    for choice, engine, taken in (("on", True, True), ("off", True, False), ("auto", True, True), ("auto", False, False)):
        setup = dataclasses.replace(PRESETS["tiny"], tensor=TensorSettings(choice))  # pyright: ignore
        assert tensor_overlap.takes_pieces(setup, rules, shape, bf16, engine) == taken, choice
