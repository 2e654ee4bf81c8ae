"""Checkpoints on meshes: what one layout saves, another restores."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sharding_rules
from mtl import checkpoint, tree
from mtl.checkpoint import arrays, geometry
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.params import decayed
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import MeshShape, make_mesh
from mtl.train.state import init_state
from tests.small import MESHES, MODELS

PIPES = {
    "single": {n: MeshShape(pipe=n) for n in (2, 4, 8)},
    "fsdp": {4: MeshShape(pipe=2, fsdp=2), 8: MeshShape(pipe=4, fsdp=2)},
    "hsdp": {8: MeshShape(pipe=2, replica=2, fsdp=2)},
    "fsdp_tensor": {8: MeshShape(pipe=2, fsdp=2, tensor=2)},
    "fsdp_context_tensor": {8: MeshShape(pipe=2, context=2, tensor=2)},
}
"""Meshes with a pipeline, by table and number of processes; named ``pipe:TABLE``."""


def layouts_of(world: int) -> list[list[Any]]:
    """Every layout of so many processes."""
    plain = [[table, world] for table, meshes in MESHES.items() if world in meshes]
    return plain + [[f"pipe:{table}", world] for table, meshes in PIPES.items() if world in meshes]


def train_state(table: str, world: int, model: str = "llama_tied", seed: int = 5, precision: str = "fp32") -> Any:
    """A fresh state whose optimizer state is no longer zero."""
    table, meshes = (table.removeprefix("pipe:"), PIPES) if table.startswith("pipe:") else (table, MESHES)
    config, rules = MODELS[model], sharding_rules.load(table)
    specs = decoder.specs(config)
    state = init_state(specs, rules, make_mesh(meshes[table][world], "cpu"), seed, PRECISIONS[precision], adamw(decayed(specs)))
    for i, leaf in enumerate(tree.leaves(state.opt_state)):
        local = leaf.to_local()
        local.add_(i + 1)
    return state


def as_meta(state: Any) -> Any:
    """The same tree without memory."""

    def meta(x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return torch.empty_like(x, device="meta")
        local = torch.empty_like(x.to_local(), device="meta")
        return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())

    return tree.map(meta, state)


def equal(a: Any, b: Any) -> bool:
    """Bitwise, part by part, on all processes."""
    pairs = zip(tree.paths(a), tree.paths(b), strict=True)
    same = all(n == m and x.dtype == y.dtype and _bits(x).equal(_bits(y)) for (n, x), (m, y) in pairs)
    votes = [None] * dist.get_world_size()
    dist.all_gather_object(votes, same)
    return all(votes)


def _bits(x: Tensor) -> Tensor:
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.contiguous().reshape(-1).view(torch.uint8)


def save(table: str, world: int, path: str, **kind: Any) -> None:
    """Save a fresh state."""
    checkpoint.save(path, train_state(table, world, **kind), host={"step": 3}, config={"table": table})


def restore(table: str, world: int, path: str, **kind: Any) -> bool:
    """Restore it on this mesh: is it what a fresh state here is?"""
    want = train_state(table, world, **kind)
    return equal(checkpoint.restore(path, as_meta(want)), want)


def matrix(paths: list[str], layouts: list[list[Any]]) -> list[Any]:
    """Restore every checkpoint on every layout of this world size; list what went wrong."""
    wrong = []
    for table, world in layouts:
        want = train_state(table, world)
        target = as_meta(want)
        wrong += [(path, table, world) for path in paths if not equal(checkpoint.restore(path, target), want)]
    return wrong


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Distinct numbers."""
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


def odd_tree(rows: int, columns: int) -> Any:
    """Leaves that split unevenly, nested, over one axis or both, or not at all."""
    mesh = init_device_mesh("cpu", (rows, columns), mesh_dim_names=("a", "b"))

    def put(shape: tuple[int, ...], *placements: Any) -> DTensor:
        whole = values(shape)
        return distribute_tensor(whole, mesh, list(placements), src_data_rank=None)

    return {
        "uneven": put((13, 6), Shard(0), Replicate()),
        "short": put((3, 5), Replicate(), Shard(0)),
        "nested": put((16, 3), Shard(0), Shard(0)),
        "nested_uneven": put((13, 3), Shard(0), Shard(0)),
        "both": put((7, 9), Shard(1), Shard(0)),
        "whole": put((5,), Replicate(), Replicate()),
        "scalar": put((), Replicate(), Replicate()),
        "list": [put((600, 700), Replicate(), Shard(0)), {"deep": put((4, 4), Shard(0), Shard(1))}],
        "plain": values((4, 3), torch.bfloat16),
    }


def save_odd(rows: int, columns: int, path: str) -> None:
    """Save it."""
    checkpoint.save(path, odd_tree(rows, columns))


def squeezed(path: str, first: bool) -> bool:
    """Save and restore the odd tree where the first process squeezes values, or all others would; large arrays have tiles."""
    told, tile = arrays.squeezes, geometry.TILE_BYTES
    arrays.squeezes, geometry.TILE_BYTES = (lambda _: (dist.get_rank() == 0) == first), 1 << 14
    try:
        checkpoint.save(path, odd_tree(2, 2))
    finally:
        arrays.squeezes, geometry.TILE_BYTES = told, tile
    want = odd_tree(4, 1)
    return equal(checkpoint.restore(path, as_meta(want)), want)


def restore_odd(rows: int, columns: int, path: str) -> bool:
    """Restore it on this mesh."""
    want = odd_tree(rows, columns)
    return equal(checkpoint.restore(path, as_meta(want)), want)


def streamed(path: str) -> None:
    """Write a tree of meta tensors box by box: every process is asked for its own boxes alone."""
    state = {"w": torch.empty(3000, 1000, device="meta"), "b": torch.empty(7, dtype=torch.bfloat16, device="meta")}
    asked = 0

    def part(name: str, box: Any) -> Tensor:
        nonlocal asked
        asked += math.prod(box[1]) if name == "w" else 0
        whole = values(tuple(state[name].shape), state[name].dtype)
        return whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]

    checkpoint.save(path, state, part=part)
    assert asked <= 3_000_000 / dist.get_world_size() * 1.1, asked


def refusal(kind: str, path: str) -> str:
    """Do something that cannot work; every process gets the message."""
    state = train_state("fsdp", dist.get_world_size())
    try:
        if kind == "exists":
            checkpoint.save(path, state)
        elif kind == "partial":
            from torch.distributed.tensor import Partial

            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            checkpoint.save(path, {"x": DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)})
        elif kind == "writer":  # one process fails while it writes

            def part(name: str, box: Any) -> Tensor:
                if dist.get_rank() == 1:
                    raise OSError(28, "No space left on device")
                return torch.ones(box[1])

            checkpoint.save(path, {"x": torch.empty(4000, 1000, device="meta")}, part=part)
    except checkpoint.CheckpointError as error:
        text = f"CheckpointError {error}"
    except ValueError as error:
        text = f"{type(error).__name__} {error}"
    else:
        text = "nothing"
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    assert len(set(texts)) == 1, texts
    assert not list(Path(path).parent.glob("*-tmp")), "nothing is left behind"
    return text


def deserted(path: str) -> str:
    """The last process never takes part."""
    from mtl.checkpoint.peers import peers
    from mtl.checkpoint.plan import make_plan
    from mtl.checkpoint.save import small_files, write_checkpoint

    if dist.get_rank() < dist.get_world_size() - 1:
        state = {"w": values((40, 30))}
        group = peers(timeout=1.0)
        plan = make_plan(state, group)
        try:
            write_checkpoint(Path(path), plan, small_files(None, None, None), group, [])
        except checkpoint.CheckpointError as error:
            text = str(error)
        else:
            text = "saved"
    else:
        text = ""
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return str(texts[0])
