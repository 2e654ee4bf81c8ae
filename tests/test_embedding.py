"""Rows of an embedding that rests in columns: exchanged where that sends less than the table, with the numbers of the whole table."""

from typing import Any

import pytest

from tests.cases.embedding import COLUMNS
from tests.ranks import Ranks

VOCAB = 50
MESHES: list[tuple[str, dict[str, int]]] = [
    ("fsdp", {"fsdp": 2}),
    ("fsdp", {"fsdp": 4}),
    ("hsdp", {"replica": 2, "fsdp": 2}),
    ("context", {"context": 2}),
    ("ulysses", {"fsdp": 2, "context": 2}),
    ("context", {"replica": 2, "fsdp": 2, "context": 2}),
]


def spelled(case: Any) -> str:
    """Name a mesh in the test report."""
    return "-".join(f"{k}{v}" for k, v in case.items()) if isinstance(case, dict) else str(case)


@pytest.mark.parametrize(("table", "mesh"), MESHES, ids=spelled)
@pytest.mark.parametrize("tokens", [VOCAB - 1, VOCAB])
def test_rows_travel_where_they_are_fewer_than_the_table_has(ranks: Ranks, table: str, mesh: dict[str, int], tokens: int) -> None:
    """By hand: the ids of all, and as many rows as a device has tokens, both ways; else the table, both ways."""
    world = 1
    for size in mesh.values():
        world *= size
    found = ranks.run("tests.cases.embedding:looked_up", world, table=table, mesh=mesh, vocab=VOCAB, tokens=tokens)
    assert max(found["errors"]) < 1e-12, found
    group = world // mesh.get("replica", 1)
    if tokens < VOCAB:
        assert found["sent"] == {"all_gather_into_tensor int64": group * tokens, "all_to_all_single float64": 2 * tokens * COLUMNS}
    else:
        columns = COLUMNS // group
        assert found["sent"] == {"all_gather_into_tensor float64": VOCAB * COLUMNS, "reduce_scatter_tensor float64": VOCAB * columns}


@pytest.mark.parametrize(("table", "mesh"), [("ddp", {"replica": 2}), ("zero1", {"fsdp": 2})], ids=spelled)
def test_a_table_that_is_whole_in_a_step_sends_nothing(ranks: Ranks, table: str, mesh: dict[str, int]) -> None:
    found = ranks.run("tests.cases.embedding:looked_up", 2, table=table, mesh=mesh, vocab=VOCAB, tokens=7)
    assert found["sent"] == {}, found


def test_gradients_of_16_bits_are_summed_in_float32(ranks: Ranks) -> None:
    """One token everywhere: its 1600 gradients of 1, which bfloat16 would add up to 256, travel in 16 bits."""
    found = ranks.run(
        "tests.cases.embedding:looked_up", 4, table="fsdp", mesh={"fsdp": 4}, vocab=500, tokens=400, precision="bf16", repeated=True
    )
    assert found["errors"] == [0.0, 0.0] and found["most"] == 1600.0, found
    assert found["sent"] == {"all_gather_into_tensor int64": 1600, "all_to_all_single bfloat16": 2 * 400 * COLUMNS}
