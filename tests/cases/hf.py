"""Import, load and export on several ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mtl.cli.hf as command
import sharding_rules
from mtl import tree
from mtl.models.hf.files import Source
from mtl.models.hf.load import load_params, open_model
from mtl.sharding.mesh import make_mesh
from tests.small import MESHES


def bring(source: str, out: str, mesh: str) -> list[int]:
    """Import a folder; gives how many elements each rank read."""
    count, read = [0], Source.read

    def counted(self: Source, name: str, cut: Any) -> torch.Tensor:
        found = read(self, name, cut)
        count[0] += found.numel()
        return found

    Source.read = counted
    try:
        command.import_folder(command.Import(Path(source), Path(out), mesh))
    finally:
        Source.read = read
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, count[0])
    return counts


def send(checkpoint: str, out: str) -> None:
    """Export a checkpoint; every rank writes some of the files."""
    command.export_folder(command.Export(Path(checkpoint), Path(out), shard_size="20KB"))


def load(source: str, table: str, world: int) -> list[str]:
    """Load a folder straight into a mesh; gives the paths whose values are not those of the files."""
    model, rules = open_model(Path(source)), sharding_rules.load(table)
    mesh = make_mesh(MESHES[table][world], "cpu")
    found = load_params(model, rules, mesh, torch.float64)
    wrong: list[str] = []
    for path, x in tree.paths(found):
        whole = model.read(path, ((0,) * x.dim(), tuple(x.shape)))
        if not torch.equal(x.full_tensor(), whole):
            wrong.append(path)
    return wrong
