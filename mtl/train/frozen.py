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


def beside(step: Step, model: Model, config: Any, par: Parallel, precision: Precision, params: tree.Tree) -> Step:
    """Make a step that trains beside frozen ``params``, DTensors at rest of ``model``'s specs.

    They are brought to the type of products once, and where the rules gather once a step they are gathered now.
    """
    held = in_type(model.specs(config), in_use(model, config, par, precision, params), precision.compute)

    def train_step(state: TrainState, batch: Batch) -> Any:
        return step(state, {**batch, "frozen": held})

    return train_step
