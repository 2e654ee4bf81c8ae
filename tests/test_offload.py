"""Offload changes no number, and does move what it says: layers' inputs in the graph, the state in every update."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtl.errors import UserError
from mtl.kernels import host_copy
from mtl.precision import PRECISIONS
from mtl.train.parts import bounds
from mtl.train.step import StepOptions
from tests.ranks import Ranks
from tests.small import BATCH, SEQ

CASES = [
    ("single", 1, "llama", "bf16", "both", "full", "none", {}),
    ("single", 1, "llama_tied", "bf16", "both", "every:2", "none", {"micros": 2}),
    ("single", 1, "llama", "fp32", "both", "full", "none", {}),
    ("single", 1, "llama", "bf16", "optimizer", "none", "block", {"optimizer": "fused"}),
    ("fsdp_tensor", 4, "gpt", "bf16", "both", "full", "none", {"optimizer": "sgd"}),
    ("zero1", 2, "llama", "bf16", "both", "full", "none", {}),
    ("ring", 2, "llama", "fp16", "both", "full", "none", {}),
    ("context", 2, "mistral", "fp8", "both", "full", "none", {"micros": 2}),
    pytest.param(("single", 1, "llama_tied", "bf16", "both", "every:2", "step", {"micros": 2}), marks=pytest.mark.slow),
    pytest.param(("fsdp", 2, "llama", "bf16", "both", "full", "step", {}), marks=pytest.mark.slow),
    pytest.param(("zero1", 2, "llama", "bf16", "both", "full", "step", {}), marks=pytest.mark.slow),
    pytest.param(("context", 2, "mistral", "fp8", "both", "full", "step", {"micros": 2}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:7])))
def test_offload_changes_no_bit_and_moves_the_state(ranks: Ranks, case: tuple[Any, ...]) -> None:
    table, world, model, precision, kind, remat, how, more = case
    found = ranks.run(
        "tests.cases.offload:same", world, table=table, world=world, model=model, precision=precision, kind=kind, remat=remat, how=how,
        **more,
    )  # fmt: skip
    assert found["equal"]
    assert found["still"] == [0, 0]
    # Each of three updates takes the state in and out; before the first, the masters come once for the weights.
    assert found["moved"] == [3 * found["state"] + found["masters"], 3 * found["state"]]


def test_offloaded_state_is_saved_and_restored(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run(
        "tests.cases.offload:same", 2, table="fsdp", world=2, model="llama", precision="bf16", kind="both", remat="full", how="none",
        path=str(tmp_path / "saved"),
    )  # fmt: skip
    assert found["equal"]
    assert found["moved"][0] == 3 * found["state"] + 2 * found["masters"], "restored masters make new weights"


def test_steps_of_several_lengths_hold_the_weights_once(ranks: Ranks) -> None:
    """Else each length would keep a copy of its own, and make it again whenever another length was last."""
    found = ranks.run("tests.cases.offload:turns", 1)
    assert found["brought"] == 4 * found["state"] + found["masters"]


@pytest.mark.parametrize("remat", ["full", pytest.param("every:2", marks=pytest.mark.slow)])
def test_inputs_of_layers_leave_and_come_back(ranks: Ranks, remat: str) -> None:
    """But for the last layer's; and each comes back after the gradient that its layer waits for was made."""
    still, moved = (ranks.run("tests.cases.graphs:counts", 1, table="single", world=1, remat=remat, away=away) for away in (False, True))
    assert (still["park"], still["unpark"]) == (0, 0)
    assert (moved["park"], moved["unpark"]) == (1, 1)
    assert moved["mm"] == still["mm"]
    kept = [ranks.run("tests.cases.graphs:kept", 1, table="single", world=1, how="step", remat=remat, away=away) for away in (False, True)]
    assert kept[0] - kept[1] == BATCH * SEQ * 32 * 8, "backward must not read what left"


def test_lanes_are_one_set_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for copies on a device named without its number waits for those of the device with it."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(host_copy, "_lanes", lambda index: f"lanes of {index}")
    assert host_copy.lanes(torch.device("cuda")) == host_copy.lanes(torch.device("cuda", 3)) == "lanes of 3"


@pytest.mark.parametrize("size", [7, 8, 50257])
@pytest.mark.parametrize("count", [1, 3, 8, 12])
def test_chunks_cover_an_array_once_in_two_sizes(size: int, count: int) -> None:
    found = [bounds(size, c, count) for c in range(count)]
    assert [start for start, _ in found] == [sum(n for _, n in found[:c]) for c in range(count)]
    assert sum(n for _, n in found) == size
    assert len({n for _, n in found[:-1]}) <= 1
    assert all(start % 64 == 0 for start, _ in found)


def test_offload_that_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'optimizer'"):
        StepOptions(PRECISIONS["fp32"], offload="optimiser")
    with pytest.raises(UserError, match="full or every:N"):
        StepOptions(PRECISIONS["fp32"], offload="activations").again()
    with pytest.raises(UserError, match="compile"):
        StepOptions(PRECISIONS["fp32"], remat="full", offload="both", compile="block")
