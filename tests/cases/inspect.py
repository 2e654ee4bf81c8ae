"""What ranks really hold, to hold layouts and plans against."""

from typing import Any

import torch
import torch.distributed as dist

import sharding_rules
from mtl import tree
from mtl.models import decoder
from mtl.params import init
from mtl.sharding.mesh import make_mesh
from mtl.sharding.shard_map import to_local
from tests.small import MESHES, MODELS


def local_shapes(table: str, world: int, model: str) -> list[dict[str, list[int]]]:
    """Give every rank's local shapes of all parameters."""
    mesh = make_mesh(MESHES[table][world], "cpu")
    held = init(decoder.specs(MODELS[model]), sharding_rules.load(table), mesh, 0, torch.float64)
    mine = {path: list(to_local(x).shape) for path, x in tree.paths(held)}
    every: list[Any] = [None] * world
    dist.all_gather_object(every, mine)
    return every
