"""The train state: everything a run needs to go on, as trees of DTensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtl import tree
from mtl.axes import names
from mtl.optim.transforms import Optimizer
from mtl.params import ParamSpec, init
from mtl.precision import Precision
from mtl.sharding.layout import box, whole
from mtl.sharding.mesh import Mesh
from mtl.sharding.rules import Rules
from mtl.sharding.shard_map import to_global

FIRST_SCALE = 2.0**15
SCALE_PATIENCE = 1000


class TrainState(NamedTuple):
    """Step (how many were taken), parameters and optimizer state; every leaf a DTensor."""

    step: Any
    params: Any
    opt_state: Any


def init_state(specs: tree.Tree, rules: Rules, mesh: Mesh, seed: int, precision: Precision, optimizer: Optimizer) -> TrainState:
    """Make a fresh state: the same bits on every mesh. With a scaled precision, opt_state carries the loss scale too."""
    return start_state(init(specs, rules, mesh, seed, precision.param), mesh, precision, optimizer)


def start_state(params: tree.Tree, mesh: Mesh, precision: Precision, optimizer: Optimizer) -> TrainState:
    """Make the state of step 0 from parameters that are on the mesh."""
    return _with_optimizer(params, torch.device(mesh.device_type), mesh, precision, optimizer)


def abstract_state(specs: tree.Tree, rules: Rules, mesh: Mesh, precision: Precision, optimizer: Optimizer) -> TrainState:
    """Make the same tree without memory, as DTensors on the meta device: what a restore asks for."""
    device = torch.device("meta")

    def make(path: str, spec: ParamSpec) -> DTensor:
        layout = rules.layout("store", names(spec.axes), spec.shape, mesh.shape, f"parameter {path!r}")
        local = torch.empty(box(spec.shape, layout, mesh)[1], dtype=precision.param, device=device)
        return to_global(local, spec.shape, layout, mesh)

    return _with_optimizer(tree.map_paths(make, specs), device, mesh, precision, optimizer)


def scaled_for(state: TrainState, mesh: Mesh, precision: Precision) -> TrainState:
    """Give a state that was restored the loss scale that a precision has: its own, or a first one, or none."""
    known = {name: x for name, x in state.opt_state.items() if name != "loss_scale"}
    if precision.scaled:
        fresh = tree.map(lambda x: _replicated(x, mesh), _first_scale(torch.device(mesh.device_type)))
        known["loss_scale"] = state.opt_state.get("loss_scale", fresh)
    return TrainState(state.step, state.params, known)


def _first_scale(device: torch.device) -> dict[str, Tensor]:
    return {"scale": torch.tensor(FIRST_SCALE, device=device), "good_steps": torch.zeros((), device=device)}


def _with_optimizer(params: tree.Tree, device: torch.device, mesh: Mesh, precision: Precision, optimizer: Optimizer) -> TrainState:
    opt_state = {"optimizer": optimizer.init(params)}
    if precision.scaled:
        opt_state["loss_scale"] = _first_scale(device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    return tree.map(lambda x: _replicated(x, mesh), TrainState(step, params, opt_state))


def next_scale(state: tree.Tree, good: Tensor) -> tree.Tree:
    """Halve the loss scale after an overflow, double it after SCALE_PATIENCE good steps."""
    steps = torch.where(good, state["good_steps"] + 1, 0.0)
    scale = torch.where(good, state["scale"], (state["scale"] / 2).clamp(min=1.0))
    grown = steps >= SCALE_PATIENCE
    return {"scale": torch.where(grown, scale * 2, scale), "good_steps": torch.where(grown, 0.0, steps)}


def _replicated(x: Tensor, mesh: Mesh) -> DTensor:
    return x if isinstance(x, DTensor) else to_global(x, x.shape, whole(x.dim()), mesh)
