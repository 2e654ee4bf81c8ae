"""Collectives and reshard on real ranks: inner-product identities, and global values after any change of layout."""

import itertools
import math
import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import vjp

from mtl.runtime import process
from mtl.sharding import collectives
from mtl.sharding.layout import Layout, box
from mtl.sharding.mesh import Mesh, MeshShape, make_mesh
from mtl.sharding.reshard import reshard

SHAPE = (16, 8, 24)


def _sum(x: Tensor) -> float:
    total = x.detach().double().sum()
    torch.distributed.all_reduce(total)
    return total.item()


def transposes() -> dict[str, float]:
    """For every collective f: <f(x), y> = <x, f'(y)>, summed over devices."""
    mesh = make_mesh(MeshShape(replica=2, context=2, tensor=torch.distributed.get_world_size() // 4), "cpu")
    functions: dict[str, Any] = {
        "all_gather": lambda x, axes: collectives.all_gather(x, axes, mesh, 1),
        "psum_scatter": lambda x, axes: collectives.psum_scatter(x, axes, mesh, 2),
        "psum": lambda x, axes: collectives.psum(x, axes, mesh),
        "all_to_all": lambda x, axes: collectives.all_to_all(x, axes, mesh, 2, 0),
        "permute": lambda x, axes: collectives.permute(x, axes, mesh, 1),
    }
    errors: dict[str, float] = {}
    torch.manual_seed(torch.distributed.get_rank())
    for (name, f), axes in itertools.product(functions.items(), (("tensor",), ("context",), ("replica", "context"))):
        x = torch.randn(4, 3, 8, dtype=torch.float64)
        out, pull = vjp(lambda x, f=f, axes=axes: f(x, axes), x)
        y = torch.randn_like(out)
        left, right = _sum(out * y), _sum(x * pull(y)[0])
        assert _sum((out - x).abs() if out.shape == x.shape else out.new_ones(1)) > 1e-3, f"{name} did nothing"
        errors[f"{name} {'+'.join(axes)}"] = abs(left - right) / abs(left)
    return errors


def agreeing() -> list[bool]:
    """Say what all ranks take from votes of which none, one or all are against."""
    at = process.Place(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
    return [process.all_agree(vote, at) for vote in (True, at.rank != 1, at.rank == 1, False)]


def _whole(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _part(x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    offset, shape = box(x.shape, layout, mesh)
    for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
        x = x.narrow(dim, start, size)
    return x.contiguous()


def _random_layout(rng: random.Random, mesh: Mesh, partial: bool) -> Layout:
    dims: list[tuple[str, ...]] = [(), (), ()]
    left: list[str] = []
    for axis in rng.sample(mesh.shape.active(), len(mesh.shape.active())):
        where = rng.randrange(-1, 3)
        if where == -1:
            left.append(axis)
        else:
            dims[where] = (*dims[where], axis)
    return Layout(tuple(dims), tuple(left) if partial else ())


def resharding(count: int, seed: int) -> int:
    """Random changes of layout give the same global array, and their transposes the same inner products."""
    world = torch.distributed.get_world_size()
    sizes = {8: (2, 2, 2), 4: (2, 2, 1), 2: (2, 1, 1)}[world]
    mesh = make_mesh(MeshShape(fsdp=sizes[0], context=sizes[1], tensor=sizes[2]), "cpu")
    rng = random.Random(seed)
    for trial in range(count):
        src, dst = _random_layout(rng, mesh, True), _random_layout(rng, mesh, False)
        terms = math.prod(mesh.size((a,)) for a in src.partial)
        x = _whole(trial)
        mine = _part(_whole(trial), src, mesh) * (1.0 + mesh.index(src.partial)) / (terms * (terms + 1) / 2)
        out, pull = vjp(lambda t, src=src, dst=dst: reshard(t, src, dst, mesh), mine)
        torch.testing.assert_close(out, _part(x, dst, mesh), rtol=1e-12, atol=1e-12, msg=f"{src} -> {dst}")
        y = _part(_whole(1000 + trial), dst, mesh)
        left, right = _sum(out * y), _sum(mine * pull(y)[0])
        assert abs(left - right) < 1e-9 * max(1.0, abs(left)), f"{src} -> {dst}: not the transpose"
    return count


def round_trip_of_shard_map() -> dict[str, Any]:
    """shard_map over DTensors equals the function of whole arrays."""
    from torch.distributed.tensor import DTensor

    from mtl.sharding.shard_map import shard_map, to_global

    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), "cpu")
    a, b = Layout((("fsdp",), ("tensor",))), Layout((("tensor",), ()))
    x, w = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    product = shard_map(lambda p, q: {"y": collectives.psum(p @ q, ("tensor",), mesh)}, mesh, (a, b), {"y": Layout((("fsdp",), ()))})
    args = [to_global(_part(t, layout, mesh), t.shape, layout, mesh) for t, layout in ((x, a), (w, b))]
    out = product(*args)["y"]
    assert isinstance(out, DTensor) and out.shape == (8, 6) and out.to_local().shape == (4, 6)
    torch.testing.assert_close(out.full_tensor(), x @ w)
    try:
        product(args[1], args[0])
    except ValueError as error:
        return {"refusal": str(error)}
    return {"refusal": ""}


def init_bits(path: str, table: str, world: int) -> bool:
    """Compare the initial parameters on a mesh, bit by bit, with one device's (written first)."""
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    import sharding_rules
    from mtl import tree
    from mtl.models import decoder
    from mtl.params import init
    from tests.small import MESHES, MODELS

    mesh = make_mesh(MESHES[table][world], "cpu")
    found = {}
    for name in ("llama", "gpt"):
        made = init(decoder.specs(MODELS[name]), sharding_rules.load(table), mesh, 11, torch.float32)
        found |= {f"{name}.{path}": p.full_tensor().contiguous().clone() for path, p in tree.paths(made)}
    if not Path(path).exists():
        save_file(found, path)
    want = load_file(path)
    return all(torch.equal(found[k], want[k]) for k in want) and found.keys() == want.keys()


def local_shapes(table: str, world: int) -> dict[str, list[int]]:
    """Give the shapes that this rank really holds at rest."""
    import sharding_rules
    from mtl import tree
    from mtl.models import decoder
    from mtl.params import init
    from tests.small import LLAMA, MESHES

    made = init(decoder.specs(LLAMA), sharding_rules.load(table), make_mesh(MESHES[table][world], "cpu"), 0, torch.float32)
    return {path: list(p.to_local().shape) for path, p in tree.paths(made)}
