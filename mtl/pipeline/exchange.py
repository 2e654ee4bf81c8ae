"""From rest to stages and back: once a step each device gets the parameters that its stages use, and returns their gradients.

At rest every parameter is one array in the order of its layers, cut evenly over the pipeline; what has no layers is cut along another
dimension. Which layers a stage has is the schedule's business: so any schedule and any split of the layers saves the same arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl.axes import LETTERS
from mtl.sharding.collectives import exchange_raw
from mtl.sharding.parallel import Parallel


@dataclass(frozen=True)
class Move:
    """How one parameter goes: ``send[i]`` are the rows (of its dimension ``dim`` at rest) for member i of ``group``.

    The rows lie on the device, so that no step waits for a copy of them.
    """

    dim: int
    group: str
    send: tuple[Tensor, ...]
    receive: tuple[int, ...]

    def to_stage(self, x: Tensor) -> Tensor:
        """Send rows at rest to where they are used; take those that are used here, in order."""
        rows = x.movedim(self.dim, 0)
        out = exchange_raw(rows.index_select(0, torch.cat(self.send)), list(self.receive), [len(rows) for rows in self.send], self.group)
        return out.movedim(0, self.dim)

    def to_rest(self, grad: Tensor, rest: Tensor) -> Tensor:
        """Return gradients to where their rows rest, summed where several devices used a row: the transpose of `to_stage`."""
        sizes = [len(rows) for rows in self.send]
        parts = exchange_raw(grad.movedim(self.dim, 0), sizes, list(self.receive), self.group).split(sizes)
        shape = rest.movedim(self.dim, 0).shape
        out = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
        for rows, part in zip(self.send, parts, strict=True):
            out.index_add_(0, rows, part)
        return out.movedim(0, self.dim)


def stage_parallel(par: Parallel) -> Parallel:
    """Give the same devices without the pipeline: what a stage computes on."""
    mesh = replace(par.mesh, shape=replace(par.mesh.shape, pipe=1), coordinates={**par.mesh.coordinates, "pipe": 0})
    return replace(par, mesh=mesh, _layouts={})


def plan(par: Parallel, letters: str, shape: Sequence[int], layers: Sequence[Sequence[int]], users: Sequence[int]) -> Move | None:
    """Plan how a parameter goes from rest to stages; None where it rests where it is used.

    ``layers[d]`` are the layers that device d of the pipeline uses, ``users`` the devices that use a parameter without layers.
    """
    rest = par.layout(letters, "store")
    dim = next((i for i, axes in enumerate(rest.dims) if "pipe" in axes), None)
    if dim is None:
        return None
    axes, size = rest.dims[dim], shape[dim]
    count, pipe = par.mesh.size(axes), par.mesh.shape.pipe

    def resting(member: int) -> range:
        chunk = -(-size // count)
        return range(min(size, member * chunk), min(size, (member + 1) * chunk))

    def used(member: int) -> Sequence[int]:
        device, part = divmod(member, count // pipe)  # pipe is the slowest axis
        if LETTERS[letters[dim]] == "layers":
            return sorted(layers[device])
        chunk = -(-size // (count // pipe))
        return range(min(size, part * chunk), min(size, (part + 1) * chunk)) if device in users else ()

    if all(list(resting(m)) == list(used(m)) for m in range(count)):
        return None
    own = resting(par.mesh.index(axes))
    mine = used(par.mesh.index(axes))
    sent = [[row - own.start for row in used(m) if row in own] for m in range(count)]
    send = tuple(torch.tensor(rows, dtype=torch.int64, device=par.mesh.device_type) for rows in sent)
    receive = tuple(sum(1 for row in mine if row in resting(m)) for m in range(count))
    return Move(dim, par.mesh.group(axes), send, receive)
