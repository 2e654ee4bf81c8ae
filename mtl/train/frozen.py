"""Training beside parameters that stay: they are an argument of every step, without gradients and without optimizer state."""

from dataclasses import dataclass
from typing import Any

from mtl import tree
from mtl.params import in_type
from mtl.precision import Precision
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train.evaluate import in_use
from mtl.train.loss import Batch, Model
from mtl.train.state import TrainState
from mtl.train.step import Step


@dataclass(eq=False)
class Held:
    """Parameters that stay, of a pipeline: ``rest`` where they rest, ``staged`` where stages use them, once the first step knows where."""

    rest: tree.Tree
    staged: tree.Tree = None


def hold(model: Model, config: Any, par: Parallel, precision: Precision, params: tree.Tree) -> tree.Tree | Held:
    """Bring ``params``, DTensors at rest of ``model``'s specs, to what a step takes: local, and in the type of products once and for all.

    Where the rules gather once a step they are gathered now; to the stages of a pipeline the first step brings them.
    """
    if par.mesh.shape.pipe > 1:
        return Held(in_type(model.specs(config), tree.map(to_local, params), precision.compute))
    return in_type(model.specs(config), in_use(model, config, par, precision, params), precision.compute)


def beside(step: Step, held: Any) -> Step:
    """Make a step that trains beside what `hold` gave."""

    def train_step(state: TrainState, batch: Batch) -> Any:
        return step(state, {**batch, "frozen": held})

    return train_step
