"""Where a run's state rests: on the device, or with --offload in host memory; and what evaluation takes from there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from experiments import remat_choice
from experiments.settings import Experiment
from mtl import tree
from mtl.checkpoint.contents import Contents
from mtl.errors import UserError
from mtl.optim.transforms import Optimizer
from mtl.precision import Precision
from mtl.sharding.mesh import Mesh, MeshShape
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules
from mtl.train import offload
from mtl.train.loss import parse_remat
from mtl.train.state import TrainState, abstract_state, scaled_for


@dataclass(frozen=True)
class Rest:
    """Where the state of a run rests."""

    offload: str
    specs: tree.Tree
    mesh: Mesh
    precision: Precision

    def fresh(self, make: Callable[..., TrainState], rules: Rules, optimizer: Optimizer) -> TrainState:
        """Make a fresh state where it rests."""
        if offload.optimizer_state(self.offload):
            return offload.begin(make, self.specs, self.mesh, self.precision, optimizer, rules=rules)
        return make(specs=self.specs, rules=rules, mesh=self.mesh, precision=self.precision, optimizer=optimizer)

    def asked(self, contents: Contents, rules: Rules, optimizer: Optimizer) -> TrainState:
        """Say what to restore from a checkpoint: a loss scale where it holds one, whatever the precision is now."""
        held = any(name.startswith("opt_state.loss_scale.") for name in contents.arrays)
        return abstract_state(self.specs, rules, self.mesh, replace(self.precision, scaled=held), optimizer)

    def restored(self, state: TrainState) -> TrainState:
        """Bring what a checkpoint gave, on the device, to where it rests."""
        state = scaled_for(state, self.mesh, self.precision)
        return offload.place(state, self.specs, self.mesh, self.precision) if offload.optimizer_state(self.offload) else state

    def weights(self, par: Parallel) -> Any:
        """Give what makes the weights that the device holds of such a state: one for all steps, whatever the length of their samples."""
        return offload.weights(self.specs, self.precision, par, self.offload)

    def usable(self, params: Any) -> Any:
        """Give parameters on the device, in the types that products take them in."""
        if not offload.optimizer_state(self.offload):
            return params
        return offload.on_device(self.specs, params, self.mesh, self.precision)


def check(setup: Experiment, shape: MeshShape) -> None:
    """Refuse what cannot be computed again, or kept in host memory."""
    away = offload.activations(setup.offload)
    parse_remat("full" if remat_choice.is_auto(setup.remat) else setup.remat, away)
    if setup.offload != "none" and shape.pipe > 1:
        raise UserError(f"--offload is {setup.offload!r} with --mesh.pipe {shape.pipe}: pipelines keep all on the device. Take none.")
