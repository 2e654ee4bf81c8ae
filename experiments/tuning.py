"""What a run trains of its model: all of it, or with --lora.rank low-rank adapters beside it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.adapters import read_adapters
from experiments.adapters import settled as read_settings
from experiments.settings import Experiment
from mtl import params, tree
from mtl.axes import names
from mtl.errors import UserError
from mtl.lora import adapters
from mtl.lora.adapters import Lora
from mtl.models import decoder
from mtl.optim.transforms import Optimizer
from mtl.precision import Precision
from mtl.sharding.layout import box
from mtl.sharding.mesh import Mesh
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules
from mtl.sharding.shard_map import to_global
from mtl.train.frozen import beside, hold
from mtl.train.state import start_state


class Tuning(NamedTuple):
    """The model as a step trains it, as evaluation runs it, and the parameters that stay."""

    model: Any = decoder
    whole: Any = decoder
    frozen: Any = None
    held: Any = None
    start: Any = None

    def step(self, step: Any) -> Any:
        """Let a step run beside the parameters that stay."""
        return step if self.held is None else beside(step, self.held)

    def begin(self, fresh: Any, given: Any) -> Any:
        """Choose what makes the first state: adapters are fresh or read, and what was given has made the parameters that stay."""
        if self.start is not None:
            return lambda specs, rules, mesh, precision, optimizer: start_state(self.start, mesh, precision, optimizer)
        return fresh if self.frozen is not None or given is None else given

    def params(self, trained: Any) -> Any:
        """Put what is trained and what stays together."""
        return tree.join(self.frozen, trained)

    def said(self, config: Any) -> str:
        """Say how much stays."""
        return "" if self.frozen is None else f" trained beside {params.count(decoder.specs(config)) / 1e6:.1f} M"


ALL = Tuning()
"""The whole model is trained."""


def settled(setup: Experiment) -> Experiment:
    """Settle what is trained: the adapters that --lora.start names bring their settings, and the model drops as these say."""
    if setup.model.dropout_lora:
        raise UserError(f"--model.dropout-lora is {setup.model.dropout_lora}: give --lora.dropout, which sets it.")
    lora = read_settings(setup.lora, setup.model)
    if lora.rank == 0 and (lora.dropout or lora.rslora):
        raise UserError("--lora.dropout and --lora.rslora need adapters: give --lora.rank, or --lora.start.")
    return replace(setup, lora=lora, model=replace(setup.model, dropout_lora=lora.dropout))


def trained(lora: Lora) -> Any:
    """Give the model that a step trains."""
    return adapters.trained(decoder, lora) if lora.rank else decoder


def tuning(lora: Lora, config: decoder.Config, par: Parallel, precision: Precision, fresh: Callable[..., Any]) -> Tuning:
    """Settle what is trained. With adapters, ``fresh`` makes the state whose parameters are the frozen ones, without an optimizer."""
    if not lora.rank:
        return ALL
    still = adapters.frozen(decoder, lora)
    base = _params(fresh, decoder.specs(config), par.rules, par.mesh, precision)
    scales = params.init(adapters.scale_specs(trained(lora).specs(config), lora), par.rules, par.mesh, 0, precision.param)
    kept = params.in_type(still.specs(config), tree.join(base, scales), precision.compute)
    start = None if lora.start is None else _read(lora, config, par, precision)
    return Tuning(trained(lora), adapters.whole(decoder, lora), kept, hold(still, config, par, precision, kept), start)


def _read(lora: Lora, config: decoder.Config, par: Parallel, precision: Precision) -> Any:
    """Lay the adapters of ``lora.start`` out on the mesh."""
    whole = dict(tree.paths(read_adapters(Path(lora.start or ""), config)[0]))

    def one(path: str, spec: params.ParamSpec) -> Any:
        layout = par.rules.layout("store", names(spec.axes), spec.shape, par.mesh.shape, f"parameter {path!r}")
        offset, shape = box(spec.shape, layout, par.mesh)
        part = whole[path][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        return to_global(part.to(par.mesh.device_type, precision.param).contiguous(), spec.shape, layout, par.mesh)

    return tree.map_paths(one, trained(lora).specs(config))


def _params(fresh: Callable[..., Any], specs: Any, rules: Rules, mesh: Mesh, precision: Precision) -> Any:
    nothing = Optimizer(lambda _: (), lambda *_: ((), ()))
    return fresh(specs=specs, rules=rules, mesh=mesh, precision=precision, optimizer=nothing).params
