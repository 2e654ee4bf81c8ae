"""Import on any number of ranks gives one set of bits; every rank reads its share alone."""

import filecmp
from pathlib import Path

import pytest
import torch

import mtl.cli.hf as command
from mtl import checkpoint, params, tree
from mtl.models import decoder
from tests import families
from tests.ranks import Ranks
from tests.small import MESHES
from tests.test_families import same_tensors


def arrays(folder: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's parameters whole."""
    config = command.model_config(checkpoint.inspect(folder))
    return dict(tree.paths(checkpoint.restore(folder, {"params": params.abstract(decoder.specs(config), torch.float64)})))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a fused tensor and key heads that a mesh of four cannot split."""
    folder = tmp_path_factory.mktemp("hf")
    families.write("falcon_40b", folder)
    return folder


@pytest.mark.parametrize(
    ("world", "mesh"), [(2, ""), (4, ""), (8, ""), (2, "tensor=2"), (4, "fsdp=2,tensor=2"), (8, "replica=2,fsdp=4"), (8, "fsdp=2,tensor=4")]
)
def test_any_ranks_import_the_same_bits(ranks: Ranks, source: Path, world: int, mesh: str, tmp_path: Path) -> None:
    command.main(["import", str(source), "--out", str(tmp_path / "one")])
    counts = ranks.run("tests.cases.hf:bring", world, source=str(source), out=str(tmp_path / "many"), mesh=mesh)
    want, got = arrays(tmp_path / "one"), arrays(tmp_path / "many")
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    total = sum(x.numel() for x in want.values())
    assert sum(counts) == total, "every element is read once"
    if mesh in ("tensor=2", "fsdp=2,tensor=2"):
        assert max(counts) < 0.8 * total, counts
    if world == 4:
        ranks.run("tests.cases.hf:send", 4, checkpoint=str(tmp_path / "many"), out=str(tmp_path / "back"))
        same_tensors(source, tmp_path / "back")
        assert filecmp.cmp(source / "config.json", tmp_path / "back/config.json", shallow=False)


@pytest.mark.parametrize(("table", "world"), [(table, max(meshes)) for table, meshes in MESHES.items() if table != "single"])
def test_a_folder_loads_straight_into_any_mesh(ranks: Ranks, source: Path, table: str, world: int) -> None:
    assert ranks.run("tests.cases.hf:load", world, source=str(source), table=table, world=world) == []


def test_a_mesh_that_the_processes_do_not_fill_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(command.UserError, match="needs 2 devices, but 1 process"):
        command.main(["import", str(source), "--out", str(tmp_path / "ckpt"), "--mesh", "tensor=2"])
