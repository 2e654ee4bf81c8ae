"""LoRA as a transform of specs: thin adapters beside chosen projections are the parameters, and the model's own stay as they are.

An adapted projection computes x W + scale (x A) B: A takes its input down to the rank, and B takes that to its output. A and B have the
letters of the projection they stand beside, so every rules table lays them out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtl import tree
from mtl.axes import names
from mtl.errors import UserError, unknown
from mtl.models import decoder
from mtl.params import ParamSpec
from mtl.precision import wide


@dataclass(frozen=True)
class Lora:
    """Adapters of a rank beside the projections that ``targets`` name, by a logical axis that they have or by their own names."""

    rank: int = 0
    """Rank of the adapters; 0 trains the model itself."""
    alpha: float = 16.0
    """Adapters count alpha / rank times."""
    targets: tuple[str, ...] = ("heads", "kv_heads", "mlp")
    """Logical axes (heads: query and out; kv_heads: key and value; mlp: up, gate and down) or names of projections (query, down, ...)."""
    dropout: float = 0.0
    """The share of an adapter's inputs that training drops, of each adapter others."""
    rslora: bool = False
    """Adapters count alpha / sqrt(rank) times."""
    start: str | None = None
    """Start from these adapters: a folder that PEFT wrote, or a run of mtl or its checkpoint. They bring rank, alpha and targets along."""

    def __post_init__(self) -> None:
        """Refuse what is no adapter."""
        if self.rank < 0:
            raise UserError(f"--lora.rank is {self.rank}: expected at least 1, or 0 for no adapters.")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"--lora.alpha is {self.alpha}: expected a number above 0.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora.dropout is {self.dropout}: a dropout rate lies from 0 to under 1.")
        known = {*decoder.PROJECTIONS, *(axis for sides in decoder.PROJECTIONS.values() for axis in names("".join(sides)))}
        for target in self.targets:
            if target not in known:
                raise unknown("target in --lora.targets", target, known)
        if self.rank and not self.targets:
            raise UserError("--lora.targets is empty: name at least one projection or axis, such as heads.")

    @property
    def scale(self) -> float:
        """Say how often adapters count."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def adapter_specs(specs: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """Declare the adapters beside a model's specs: what is trained. B starts at zero, so the model starts as it was."""
    layers = specs["layers"]
    chosen = {n: sides for n, sides in decoder.PROJECTIONS.items() if n in layers and _wanted(n, sides, lora.targets)}
    if not chosen:
        raise UserError(f"--lora.targets {', '.join(lora.targets)} name no projection of this model. It has: {', '.join(_held(layers))}.")
    return {"layers": {name: {"lora": _pair(layers[name]["weight"], sides, lora.rank)} for name, sides in chosen.items()}}


def scale_specs(adapters: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """Declare how often each adapter counts: one number a layer, which stays as it is."""

    def one(pair: Mapping[str, Any]) -> dict[str, Any]:
        return {"lora": {"scale": ParamSpec(pair["lora"]["a"].shape[:1], "L", fill=lora.scale)}}

    return {"layers": {name: one(pair) for name, pair in adapters["layers"].items()}}


@dataclass(frozen=True)
class Adapted:
    """A model whose parameters are others than it declares: ``declare(config)`` gives their specs. The functions are the model's."""

    model: Any
    declare: Callable[[Any], tree.Tree]

    def specs(self, config: Any) -> tree.Tree:
        """Declare the parameters."""
        return self.declare(config)

    def __getattr__(self, name: str) -> Any:
        """Give the model's function."""
        return getattr(self.model, name)


def trained(model: Any, lora: Lora) -> Any:
    """Give the model whose parameters are the adapters alone: what a step trains."""
    return Adapted(model, lambda config: adapter_specs(model.specs(config), lora))


def frozen(model: Any, lora: Lora) -> Any:
    """Give the model whose parameters are those that stay: its own and the adapters' scales."""

    def declare(config: Any) -> tree.Tree:
        specs = model.specs(config)
        return tree.join(specs, scale_specs(adapter_specs(specs, lora), lora))

    return Adapted(model, declare)


def whole(model: Any, lora: Lora) -> Any:
    """Give the model with adapters in place: what evaluation and generation run."""
    return Adapted(model, lambda config: tree.join(frozen(model, lora).specs(config), trained(model, lora).specs(config)))


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
    """Add the adapters to the weights they stand beside and leave them out: plain parameters, laid out as they were.

    Takes a whole tree, of tensors or of DTensors at rest. Each device multiplies its own parts and nothing is sent: A is split as the
    weight's input is, B as its output.
    """
    layers = {name: _merged(name, p) if isinstance(p, Mapping) and "lora" in p else p for name, p in params["layers"].items()}
    return {**params, "layers": layers}


def _merged(name: str, p: Mapping[str, Any]) -> dict[str, Any]:
    inner, outer = decoder.PROJECTIONS[name]
    w, a, b, scale = (x.to_local() if isinstance(x, DTensor) else x for x in (p["weight"], *(p["lora"][k] for k in ("a", "b", "scale"))))
    letters = "D" + (inner + outer).replace("D", "")
    kind = wide(w.dtype)
    change = torch.einsum(f"L{inner}R,LR{outer}->L{letters}", a.to(kind), b.to(kind)) * scale.to(kind).view(-1, *[1] * (w.dim() - 1))
    return {**{k: v for k, v in p.items() if k != "lora"}, "weight": _like(p["weight"], (w.to(kind) + change).to(w.dtype))}


def _like(old: Any, local: Tensor) -> Any:
    if not isinstance(old, DTensor):
        return local
    return DTensor.from_local(local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride())


def _wanted(name: str, sides: tuple[str, str], targets: tuple[str, ...]) -> bool:
    return any(t == name or t in names("".join(sides)) for t in targets)


def _held(layers: Mapping[str, Any]) -> list[str]:
    return [name for name in decoder.PROJECTIONS if name in layers]


def _pair(weight: ParamSpec, sides: tuple[str, str], rank: int) -> dict[str, ParamSpec]:
    size = dict(zip(weight.axes, weight.shape, strict=True))
    (inner, ins), (outer, outs) = ((side, tuple(size[c] for c in side)) for side in sides)
    fan_in = 1
    for n in ins:
        fan_in *= n
    return {
        "a": ParamSpec((size["L"], *ins, rank), f"L{inner}_", (3 * fan_in) ** -0.5),
        "b": ParamSpec((size["L"], rank, *outs), f"L_{outer}"),
    }
