"""Updates layer by layer: nothing is put into stacks that needs no sum, and every bit but the norm's is that of an update of the whole."""

import pytest
import torch

from mtl.train.parts import Parts, stacked
from tests.ranks import Ranks

STACKED = {"single": 0, "fsdp": 2, "ddp": 9}
"""What is still put into stacks: where a parameter is on every device, its gradient is summed over them, once for all layers."""


@pytest.mark.parametrize(
    ("table", "world", "optimizer", "more"),
    [
        ("single", 1, "plain", {}),
        ("single", 1, "fused", {"micros": 2}),
        ("fsdp", 2, "plain", {"micros": 2}),
        pytest.param("fsdp", 2, "sgd", {}, marks=pytest.mark.slow),
        pytest.param("ddp", 2, "plain", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_not_stacked_and_every_bit_stays(ranks: Ranks, table: str, world: int, optimizer: str, more: dict[str, int]) -> None:
    found = ranks.run("tests.cases.parts:same", world, table=table, world=world, model="llama", optimizer=optimizer, **more)
    assert found["same"]
    apart, whole = found["stacks"]
    assert whole - apart == STACKED["ddp"] - STACKED[table]


@pytest.mark.parametrize(("table", "world"), [("single", 1), ("fsdp", 2)])
def test_the_norm_that_clips_is_the_same_but_for_rounding(ranks: Ranks, table: str, world: int) -> None:
    """Its squares are summed in another order."""
    found = ranks.run("tests.cases.parts:same", world, table=table, world=world, model="llama", optimizer="plain", clip=0.1)
    assert found["error"] < 1e-11


@pytest.mark.parametrize("parts", [Parts(0), Parts(0, 5), Parts(3), Parts(3, 4)], ids=str)
def test_parts_take_every_element_once(parts: Parts) -> None:
    stack, alone = torch.arange(3 * 1000).view(3, 10, 100), torch.arange(700).view(7, 100)
    for x, by_layer in ((stack, True), (alone, False)):
        found = [parts.take(x, by_layer, c).flatten() for c in range(parts.count)]
        assert torch.equal(torch.cat(found), x.flatten())
    assert parts != Parts(3) or parts.take(torch.arange(3), True, 1).tolist() == [1]
    layers = list(stack.unbind(0))
    assert not parts.layers or all(torch.equal(parts.take(layers, True, c), parts.take(stack, True, c)) for c in range(parts.count))


def test_arrays_of_all_layers_are_told_by_their_path() -> None:
    params = {"embed": torch.zeros(3, 4), "layers": {"norm": torch.zeros(3), "mlp": {"up": torch.zeros(3, 4)}}}
    found = stacked((params, ({"mean": params, "count": torch.zeros(())}, ())), 3)
    assert found == [False, True, True, False, True, True, False]
    assert not any(stacked({"encoder": {"layers": torch.zeros(2, 4)}}, 3))
