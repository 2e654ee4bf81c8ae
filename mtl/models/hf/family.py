"""A family of models as Hugging Face has them: how its config.json becomes a `Config` and back, and its name map. One file each."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtl import tree
from mtl.errors import UserError
from mtl.models import decoder, families
from mtl.models.decoder import Config
from mtl.models.hf.fields import Fields, dtype
from mtl.models.hf.names import Row
from mtl.params import ParamSpec

Names = Mapping[str, Row]


@dataclass(frozen=True)
class Family:
    """One family. ``read`` and ``write`` are each other's inverse as far as config.json can say what a `Config` says."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    """The first is written where a checkpoint does not remember its own."""
    read: Callable[[Fields], Config]
    write: Callable[[Config], dict[str, Any]]
    names: Callable[[Config], Names]
    """Our paths, each with its row; those that the `Config` has no parameter for are ignored."""
    prefix: str = "model."
    """What their tensors but the head begin with; files of the model without a head lack it."""
    buffers: str = r"\.rotary_emb\.inv_freq$"
    """Tensors of older files that are computed, not learned: skipped."""

    def rows(self, config: Config) -> list[tuple[str, ParamSpec, Row]]:
        """List every parameter of a model with its spec and row."""
        names = self.names(config)
        return [(path, spec, names[path]) for path, spec in tree.paths(decoder.specs(config))]

    def is_buffer(self, name: str) -> bool:
        """Tell whether a tensor is one that is computed."""
        return re.search(self.buffers, name) is not None


def find(values: Mapping[str, Any]) -> Family:
    """Find the family of a config.json by its model_type and architectures, which must agree."""
    known = known_families()
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    by_type = [f for f in known if kind in f.model_types]
    if kind is not None and not by_type:
        types = ", ".join(t for f in known for t in f.model_types)
        raise UserError(f"config.json: model_type is {kind!r}, which mtl has no family for. Known: {types}.")
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise UserError(f"config.json: architectures is {architectures!r}; expected a list of names.")
    for name in architectures:
        found = [f for f in by_type or known if name in f.architectures]
        if not found:
            names = ", ".join(a for f in by_type or known for a in f.architectures)
            what = f"does not belong to model_type {kind!r}" if by_type else "is not known"
            raise UserError(f"config.json: architecture {name!r} {what}. Known: {names}.")
        by_type = found
    if not by_type:
        raise UserError("config.json: it has neither model_type nor architectures, so its family is not known.")
    return by_type[0]


def read_config(values: Mapping[str, Any]) -> tuple[Family, Config]:
    """Read a config.json; what cannot be kept is refused by name."""
    family, fields = find(values), Fields(values)
    dtype(values)
    config = family.read(fields)
    fields.finish(family.name)
    return family, config


def write_config(config: Config, source: Mapping[str, Any] | None, longest: int = 2048) -> tuple[Family, dict[str, Any]]:
    """Write a config.json: the one it was read from as far as it still holds, else by the first family that can say all of it.

    A model that does not say how many positions it knows is said to know ``longest``.
    """
    scaling = config.rope_scaling
    known = scaling.original if scaling.kind == "dynamic" else longest
    config = replace(config, max_positions=config.max_positions or known)
    if source is not None:
        family, before = read_config(source)
        if comparable(before) == comparable(config):
            return family, dict(source)
        fields = Fields(source)
        family.read(fields)
        kept = {name: value for name, value in source.items() if name not in fields.used}
        written = family.write(config)
        if _says(family, written, config):
            return family, {**kept, **written}
        raise UserError(
            f"family {family.name} cannot say in its config.json what this model is now: {_difference(family, written, config)}."
        )
    lacking: list[str] = []
    for family in known_families():
        written = {"architectures": [family.architectures[0]], "model_type": family.model_types[0], **family.write(config)}
        if _says(family, written, config):
            return family, written
        lacking.append(f"{family.name}: {_difference(family, written, config)}")
    raise UserError("no family's config.json can say what this model is.\n  " + "\n  ".join(lacking))


def known_families() -> list[Family]:
    """List the families: every module of mtl.models.families has one."""
    names = sorted(m.name for m in pkgutil.iter_modules(families.__path__))
    return [importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names]


def comparable(config: Config) -> Config:
    """Leave out what is chosen anew for every run: kernels, the loss's extra terms, how weights start, dropout, our order of pairs."""
    return replace(
        config, attention_impl="auto", loss_impl="auto", z_loss=0.0, init_std=0.02, dropout_embed=0.0, dropout_attention=0.0,
        dropout_mlp=0.0, dropout_lora=0.0, rope_pairs="half",
    )  # fmt: skip


def _says(family: Family, written: Mapping[str, Any], config: Config) -> bool:
    return not _difference(family, written, config)


def _difference(family: Family, written: Mapping[str, Any], config: Config) -> str:
    """List the settings that come back otherwise when what was written is read."""
    try:
        got = vars(comparable(family.read(Fields(written))))
    except UserError as error:
        return str(error)
    return ", ".join(f"{name} = {value!r}" for name, value in vars(comparable(config)).items() if got[name] != value)
