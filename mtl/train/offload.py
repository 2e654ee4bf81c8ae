"""Optimizer state and master weights in host memory: the device holds weights in the type of products, and the update streams the rest.

While one part is updated, the next comes and the one before leaves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtl import tree
from mtl.errors import unknown
from mtl.kernels import host_copy
from mtl.optim.transforms import Optimizer
from mtl.params import is_product
from mtl.precision import Precision
from mtl.sharding.mesh import Mesh
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train.parts import Parts, count_layers, stacked
from mtl.train.state import TrainState, start_state

CHUNK = 2**25
"""Parameters of a part: 128 MiB of each kind of float32 array. Two parts of them come, two leave."""
KINDS = ("none", "activations", "optimizer", "both")


def check(offload: str) -> None:
    """Refuse an unknown kind."""
    if offload not in KINDS:
        raise unknown("--offload", offload, KINDS)


def activations(offload: str) -> bool:
    """Tell whether what layers keep waits on the host."""
    return offload in ("activations", "both")


def optimizer_state(offload: str) -> bool:
    """Tell whether optimizer state and master weights live on the host."""
    return offload in ("optimizer", "both")


def weights(specs: tree.Tree, precision: Precision, par: Parallel, offload: str) -> "Weights | None":
    """Give what makes the weights that the device holds, where the masters may be on the host."""
    return Weights(specs, precision, torch.device(par.mesh.device_type)) if optimizer_state(offload) else None


def leaves_device(spec: Any, precision: Precision) -> bool:
    """Tell whether a parameter's master lives on the host: those of products do, where they are used in another type."""
    return is_product(spec) and precision.compute != precision.param


def place(state: TrainState, specs: tree.Tree, mesh: Mesh, precision: Precision) -> TrainState:
    """Move a state that is on the device to where it rests with offload."""
    opt_state = tree.map(lambda x: _to_host(x, mesh) if x.dim() else x, state.opt_state)
    return TrainState(state.step, place_params(specs, state.params, mesh, precision), opt_state)


def begin(fresh: Callable[..., TrainState], specs: tree.Tree, mesh: Mesh, precision: Precision, optimizer: Optimizer, **more: Any) -> Any:
    """Make a fresh state in place: ``fresh`` makes one without optimizer state, which is never on the device."""
    nothing = Optimizer(lambda _: (), lambda *_: ((), ()))
    params = fresh(specs=specs, mesh=mesh, precision=precision, optimizer=nothing, **more).params
    return place(start_state(place_params(specs, params, mesh, precision), mesh, precision, optimizer), specs, mesh, precision)


def place_params(specs: tree.Tree, params: tree.Tree, mesh: Mesh, precision: Precision) -> tree.Tree:
    """Move the masters of products to the host."""
    return tree.map(lambda s, p: _to_host(p, mesh) if leaves_device(s, precision) else p, specs, params)


def in_use(specs: tree.Tree, params: tree.Tree, device: torch.device, precision: Precision) -> tree.Tree:
    """Give local parameters on the device, in the types that the loss takes them in, from those at rest."""
    return tree.map(lambda s, p: _copy_in_use(p, device, precision) if leaves_device(s, precision) else p, specs, params)


def on_device(specs: tree.Tree, params: tree.Tree, mesh: Mesh, precision: Precision) -> tree.Tree:
    """The same for global parameters, as evaluation takes them."""

    def one(spec: Any, x: Any) -> Any:
        if not leaves_device(spec, precision):
            return x
        local = _copy_in_use(to_local(x), torch.device(mesh.device_type), precision)
        return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())

    return tree.map(one, specs, params)


class Weights:
    """The weights that the device holds: made from the masters, and again whenever these are not what the last update wrote."""

    def __init__(self, specs: tree.Tree, precision: Precision, device: torch.device) -> None:
        """Take what decides them."""
        self.specs, self.precision, self.device = specs, precision, device
        self.held: Any = None
        self.written: list[tuple[int, int]] = []

    def __call__(self, masters: tree.Tree) -> tree.Tree:
        """Give the weights of local masters."""
        if self.held is None or self.written != _marks(masters):
            self.held = None
            self.held = in_use(self.specs, masters, self.device, self.precision)
            self.settled(masters)
        return tree.map(lambda s, p, w: w if leaves_device(s, self.precision) else p, self.specs, masters, self.held)

    def settled(self, masters: tree.Tree) -> None:
        """Take down that the weights are those of the masters as they are now."""
        self.written = _marks(masters)


def stream(apply: Any, state: TrainState, grads: tree.Tree, weights: Weights, scalars: Any, by_layer: bool) -> None:
    """Update parameters and optimizer state in place, part by part: ``apply(params, opt_state, grads, scalars)`` gives new ones.

    ``by_layer``: gradients come so, at least some of them.
    """
    device, opt_state = weights.device, state.opt_state["optimizer"]
    held, structure = tree.flatten((state.params, opt_state))
    taken = parts(state.params, by_layer)
    layered = stacked((state.params, opt_state), taken.layers)
    masters = [leaves_device(spec, weights.precision) for spec in tree.leaves(weights.specs)]
    away = [*masters, *(bool(x.dim()) for x in tree.leaves(opt_state))]
    grad_leaves = tree.leaves_like(state.params, tree.map(torch.Tensor.contiguous, grads))
    in_use_leaves = tree.leaves(weights.held)
    after: list[list[Any]] = []
    scalars_after: list[Tensor] = []

    def fetched(c: int) -> list[tuple[Tensor, Any]]:
        now = [taken.take(x, whole, c) if x.dim() else x for x, whole in zip(held, layered, strict=True)]
        return [host_copy.bring(x, device) if leaves else (x, None) for x, leaves in zip(now, away, strict=True)]

    ahead = fetched(0)
    for c in range(taken.count):
        if c > 1:
            _wait(after[c - 2])  # else the host runs ahead, and every part takes memory of its own
        now, ahead = ahead, fetched(c + 1) if c + 1 < taken.count else []
        for _, event in now:
            if event is not None:
                torch.cuda.current_stream(device).wait_event(event)
        params, opt_state = tree.unflatten(structure, [x for x, _ in now])
        part = [taken.take(g, whole, c) for g, whole in zip(grad_leaves, layered, strict=False)]  # parameters come first
        new = tree.leaves(apply(params, opt_state, tree.unflatten(tree.flatten(params)[1], part), scalars))
        for w, x, leaves, whole in zip(in_use_leaves, new, masters, layered, strict=False):
            if leaves:
                taken.take(w, whole, c).copy_(x)
        columns = zip(new, held, away, layered, strict=True)
        after.append([_stored(x, taken.take(target, whole, c), leaves) for x, target, leaves, whole in columns if target.dim()])
        scalars_after = [x for x, target in zip(new, held, strict=True) if not target.dim()]
    for target, x in zip([x for x in held if not x.dim()], scalars_after, strict=True):
        target.copy_(x)
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(host_copy.lanes(device).out)


def parts(params: tree.Tree, by_layer: bool) -> Parts:
    """Say in which parts an update takes its state, of `CHUNK` parameters or less; what has few rows may make the last one larger."""
    layers = count_layers(params) if by_layer else 0
    return Parts(layers, max(1, -(-sum(x.numel() for x in tree.leaves(params)) // (CHUNK * max(1, layers)))))


def _stored(x: Tensor, target: Tensor, leaves: bool) -> Any:
    if leaves:
        return host_copy.put(x, target)
    target.copy_(x)
    return None


def _wait(events: list[Any]) -> None:
    for event in events:
        if event is not None:
            event.synchronize()


def _copy_in_use(master: Tensor, device: torch.device, precision: Precision) -> Tensor:
    out = torch.empty(master.shape, dtype=precision.compute, device=device)
    for piece, target in zip(master.view(-1).split(CHUNK), out.view(-1).split(CHUNK), strict=True):
        copy, event = host_copy.bring(piece, device)
        _wait([event])  # else the host runs ahead, and every piece takes memory of its own
        target.copy_(copy)
    return out


def _marks(masters: tree.Tree) -> list[tuple[int, int]]:
    return [(x.data_ptr(), x._version) for x in tree.leaves(masters)]  # pyright: ignore[reportPrivateUsage]


def _to_host(x: Any, mesh: Mesh) -> Any:
    local: Tensor = to_local(x)
    device = torch.device(mesh.device_type)
    if local.device.type != "cpu" or device.type == "cpu":
        local = torch.empty(local.shape, dtype=local.dtype, device="cpu").copy_(local)
    host = local if local.is_pinned() else host_copy.pin(local.contiguous(), device)
    # from_local would move it to the mesh's device.
    return DTensor(host, x._spec, requires_grad=False) if isinstance(x, DTensor) else host  # pyright: ignore
