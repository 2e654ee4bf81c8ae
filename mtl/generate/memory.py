"""What generation holds on a device: the cache as a tree of specs, laid out by the same rules, and the parameters ready for use."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtl import tree
from mtl.axes import names
from mtl.params import ParamSpec
from mtl.precision import Precision
from mtl.sharding.layout import box
from mtl.sharding.mesh import Mesh, MeshShape
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules

SEQUENCE = ("seq", "residual_seq", "query_seq", "key_seq")


def one_token(rules: Rules) -> Rules:
    """Give the rules for decoding, where the sequence in work is one token long.

    The token is whole on every device; the slots of the cache lie where the sequence lies inside a layer, heads where the layer makes them.
    """
    act = {**rules.act, **dict.fromkeys(SEQUENCE, ()), "key_seq": rules.act["seq"]}
    act |= {"core_heads": act["heads"], "core_kv_heads": act["kv_heads"]}
    whole = (*rules.whole, "core_kv_heads") if "kv_heads" in rules.whole else rules.whole
    return replace(rules, act=act, whole=whole, order="contiguous")


@dataclass(frozen=True)
class Room:
    """Sizes of a generation: rows over all devices, prompt slots and decode slots over all devices that share the sequence."""

    rows: int
    prompt: int
    decode: int

    @property
    def slots(self) -> int:
        """Count the slots of a row."""
        return self.prompt + self.decode


def room(rules: Rules, mesh: MeshShape, rows: int, prompt: int, decode: int) -> Room:
    """Round up to what the mesh divides: rows, the prompt in whole pieces, and as many decode slots on every device."""
    sizes = mesh.sizes()
    pieces = math.lcm(*(math.prod(sizes[axis] for axis in rules.act[name]) for name in SEQUENCE))
    pieces *= 2 if rules.order == "zigzag" else 1
    rows_apart = math.prod(sizes[axis] for axis in rules.act["batch"])
    slots_apart = math.prod(sizes[axis] for axis in rules.act["seq"])
    return Room(_up(rows, rows_apart), _up(prompt, pieces), _up(decode, slots_apart))


def parallels(model: Any, config: Any, mesh: Mesh, rules: Rules, space: Room, precision: Precision) -> tuple[Parallel, Parallel]:
    """Give the two ways to run: over prompts, and over one token at a time."""
    sizes = {**model.sizes(config), "batch": space.rows}
    prompt = Parallel(mesh, rules, {**sizes, **dict.fromkeys(SEQUENCE, space.prompt)}, precision.reduce)
    return prompt, Parallel(mesh, one_token(rules), {**sizes, **dict.fromkeys(SEQUENCE, 1), "key_seq": space.slots}, precision.reduce)


def cache_bytes(specs: tree.Tree, rules: Rules, mesh: MeshShape, dtype: torch.dtype) -> int:
    """Count the bytes of a cache on one device, from its specs alone."""
    sizes = mesh.sizes()

    def one(spec: ParamSpec) -> int:
        layout = one_token(rules).layout("act", names(spec.axes), spec.shape, mesh, "cache")
        return math.prod(spec.shape) * dtype.itemsize // math.prod(sizes[axis] for axis in layout.used())

    return sum(one(spec) for spec in tree.leaves(specs))


def allocate(specs: tree.Tree, par: Parallel, dtype: torch.dtype) -> tree.Tree:
    """Make this device's part of a cache, empty."""

    def one(spec: ParamSpec) -> Tensor:
        local = box(spec.shape, par.layout(spec.axes), par.mesh)[1]
        return torch.zeros(local, dtype=dtype, device=par.mesh.device_type)

    return tree.map(one, specs)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
