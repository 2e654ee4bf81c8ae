"""Training beside parameters that stay: they are an argument of every step, without gradients and without optimizer state."""

from typing import Any

from mtl import tree
from mtl.params import in_type
from mtl.precision import Precision
from mtl.sharding.parallel import Parallel
from mtl.train.evaluate import in_use
from mtl.train.loss import Batch, Model
from mtl.train.state import TrainState
from mtl.train.step import Step


def hold(model: Model, config: Any, par: Parallel, precision: Precision, params: tree.Tree) -> tree.Tree:
    """Bring ``params``, DTensors at rest of ``model``'s specs, to what a step takes: local, and in the type of products once and for all.

    Where the rules gather once a step they are gathered now.
    """
    return in_type(model.specs(config), in_use(model, config, par, precision, params), precision.compute)


def beside(step: Step, held: tree.Tree) -> Step:
    """Make a step that trains beside what `hold` gave."""

    def train_step(state: TrainState, batch: Batch) -> Any:
        return step(state, {**batch, "frozen": held})

    return train_step
