"""A vocabulary grows: old rows untouched, new rows the mean, the same on any mesh, and training goes on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases.grow import NEW, OLD
from tests.ranks import Ranks


@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_old_rows_stay_and_new_ones_are_the_mean(ranks: Ranks, references: Path, model: str) -> None:
    path = references / f"grown-{model}.safetensors"
    ranks.run("tests.cases.grow:reference", 1, model=model, path=str(path))
    found = load_file(path)
    changed = 0
    for name in [n.removeprefix("old.") for n in found if n.startswith("old.")]:
        old, new = found[f"old.{name}"], found[f"new.{name}"]
        dim = {"embed.weight": 0, "head.weight": 1}.get(name)
        if dim is None:
            assert torch.equal(old, new), name
            continue
        changed += 1
        assert new.shape[dim] == NEW and torch.equal(new.narrow(dim, 0, OLD), old), name
        mean = old.mean(dim, keepdim=True)
        assert ((new.narrow(dim, OLD, NEW - OLD) - mean).abs() <= 1e-14 * old.abs().max()).all(), name
        after = found[f"after.{name}"].narrow(dim, OLD, NEW - OLD)
        assert (after - mean).abs().amax(1 - dim).min() > 1e-4, "every new token is trained"
    assert changed == (1 if model == "gpt" else 2)


PLACES = [("tensor", 4), ("fsdp", 4), ("fsdp_tensor", 4), ("zero1", 2), ("fsdp_ring_tensor", 4), ("fsdp_context_tensor", 8)]
EVERY = [(("llama", "gpt")[turn], *place) for turn in (0, 1) for place in PLACES]
SOME = [(("llama", "gpt")[i % 2], *place) for i, place in enumerate(PLACES[:5])]


@pytest.mark.parametrize(
    ("model", "table", "world"), [case if case in SOME else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]
)
def test_any_mesh_grows_alike(ranks: Ranks, references: Path, model: str, table: str, world: int) -> None:
    path = references / f"grown-{model}.safetensors"
    if not path.exists():
        ranks.run("tests.cases.grow:reference", 1, model=model, path=str(path))
    found = ranks.run("tests.cases.grow:equal", world, table=table, world=world, model=model, path=str(path))
    assert found["same"] and found["error"] < 1e-9, found
