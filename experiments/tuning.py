"""What a run trains of its model: all of it, or with --lora.rank low-rank adapters beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mtl import params, tree
from mtl.lora import adapters
from mtl.lora.adapters import Lora
from mtl.models import decoder
from mtl.optim.transforms import Optimizer
from mtl.precision import Precision
from mtl.sharding.mesh import Mesh
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules
from mtl.train.frozen import beside, hold


class Tuning(NamedTuple):
    """The model as a step trains it, as evaluation runs it, and the parameters that stay."""

    model: Any = decoder
    whole: Any = decoder
    frozen: Any = None
    held: Any = None

    def step(self, step: Any) -> Any:
        """Let a step run beside the parameters that stay."""
        return step if self.held is None else beside(step, self.held)

    def begin(self, fresh: Any, given: Any) -> Any:
        """Choose what makes the first state: with adapters they are fresh, and what was given has made the parameters that stay."""
        return fresh if self.frozen is not None or given is None else given

    def params(self, trained: Any) -> Any:
        """Put what is trained and what stays together."""
        return tree.join(self.frozen, trained)

    def said(self, config: Any) -> str:
        """Say how much stays."""
        return "" if self.frozen is None else f" trained beside {params.count(decoder.specs(config)) / 1e6:.1f} M"


def trained(lora: Lora) -> Any:
    """Give the model that a step trains."""
    return adapters.trained(decoder, lora) if lora.rank else decoder


def tuning(lora: Lora, config: decoder.Config, par: Parallel, precision: Precision, fresh: Callable[..., Any]) -> Tuning:
    """Settle what is trained. With adapters, ``fresh`` makes the state whose parameters are the frozen ones, without an optimizer."""
    if not lora.rank:
        return Tuning()
    still = adapters.frozen(decoder, lora)
    base = _params(fresh, decoder.specs(config), par.rules, par.mesh, precision)
    scales = params.init(adapters.scale_specs(trained(lora).specs(config), lora), par.rules, par.mesh, 0, precision.param)
    kept = params.in_type(still.specs(config), tree.join(base, scales), precision.compute)
    return Tuning(trained(lora), adapters.whole(decoder, lora), kept, hold(still, config, par, precision, kept))


def _params(fresh: Callable[..., Any], specs: Any, rules: Rules, mesh: Mesh, precision: Precision) -> Any:
    nothing = Optimizer(lambda _: (), lambda *_: ((), ()))
    return fresh(specs=specs, rules=rules, mesh=mesh, precision=precision, optimizer=nothing).params
