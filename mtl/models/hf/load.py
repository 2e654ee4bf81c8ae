"""From a folder's tensors to our arrays, box by box: all is checked before anything is read, and no more is read than the box needs."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mtl import params, tree
from mtl.errors import UserError
from mtl.models import decoder
from mtl.models.decoder import Config
from mtl.models.hf.family import Family, read_config
from mtl.models.hf.files import DTYPES, Source, listed, open_source
from mtl.models.hf.names import Row, take, their_shape
from mtl.params import ParamSpec
from mtl.sharding.layout import box
from mtl.sharding.mesh import Mesh
from mtl.sharding.rules import Rules
from mtl.sharding.shard_map import to_global

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape) of a part of one of our arrays."""

ROWS = 1 << 12
"""Rows of a tied head that are compared with the embedding at once."""


@dataclass(frozen=True)
class Model:
    """A folder whose tensors are all there: ``dtypes`` and ``rows`` are by our path, ``named`` maps a row's name to the file's."""

    source: Source
    family: Family
    config: Config
    specs: dict[str, ParamSpec]
    rows: dict[str, Row]
    dtypes: dict[str, torch.dtype]
    named: dict[str, str]

    def read(self, path: str, part: Box) -> Tensor:
        """Read one box of one of our arrays, in the type that the files have."""
        spec, row, (offset, shape) = self.specs[path], self.rows[path], part
        spans = list(zip(offset, shape, strict=True))
        if spec.axes[:1] != "L":
            return self._cut(row.name, row, spec.axes, spec.shape, spans)
        first, count = spans[0]
        if count == 1:
            return self._cut(row.name.format(first), row, spec.axes[1:], spec.shape[1:], spans[1:]).unsqueeze(0)
        out = torch.empty(shape, dtype=self.dtypes[path])
        for i in range(count):
            out[i] = self._cut(row.name.format(first + i), row, spec.axes[1:], spec.shape[1:], spans[1:])
        return out

    def _cut(self, name: str, row: Row, axes: str, shape: Sequence[int], spans: list[tuple[int, int]]) -> Tensor:
        return self.source.read(self.named[name], lambda theirs: take(row, axes, shape, theirs, spans))


def open_model(folder: Path) -> Model:
    """Read what a folder's model is and check that its files hold exactly that."""
    source = open_source(folder)
    try:
        family, config = read_config(source.config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    rows = family.rows(config)
    specs, table = {path: spec for path, spec, _ in rows}, {path: row for path, _, row in rows}
    problems, named = list[str](), dict[str, str]()
    dtypes: dict[str, dict[str, str]] = {path: {} for path in specs}
    for path, spec, row in rows:
        inner, shape = (spec.axes[1:], spec.shape[1:]) if spec.axes[:1] == "L" else (spec.axes, spec.shape)
        expected = their_shape(row, inner, shape)
        for name in _names(row, spec):
            short = name.removeprefix(family.prefix)
            held = name if name in source.tensors else short if short in source.tensors else None
            if held is None:
                problems.append(f"tensor {name}: missing")
                continue
            stored, named[name] = source.tensors[held], held
            dtypes[path].setdefault(stored.dtype, held)
            if stored.shape != expected:
                problems.append(f"tensor {held}: shape {list(stored.shape)}, expected {list(expected)}")
            elif stored.dtype not in DTYPES:
                problems.append(f"tensor {held}: type {stored.dtype}; expected one of {', '.join(DTYPES)}")
    for path, kinds in dtypes.items():
        if len(kinds) > 1 and set(kinds) <= set(DTYPES):
            found = ", ".join(f"{name} {kind}" for kind, name in kinds.items())
            problems.append(f"the layers' tensors of {path} differ in type: {found}")
    extra = source.tensors.keys() - set(named.values())
    heads = {name for name in extra if config.tied and name == "lm_head.weight"}
    problems += [f"tensor {name}: not part of this model" for name in sorted(extra - heads) if not family.is_buffer(name)]
    if problems:
        unique = list(dict.fromkeys(problems))
        raise UserError(f"{folder} does not hold the tensors of the {family.name} model in its config.json.\n  {listed(unique)}")
    for name in heads:
        _same(source, name, named[table["embed.weight"].name])
    types = {path: DTYPES[next(iter(kinds))] for path, kinds in dtypes.items()}
    return Model(source, family, config, specs, table, types, named)


def load_params(model: Model, rules: Rules, mesh: Mesh, dtype: torch.dtype) -> tree.Tree:
    """Read every parameter straight into its place on the mesh, as DTensors of ``dtype``; each process reads its own boxes alone."""
    specs = decoder.specs(model.config)
    layouts = dict(tree.paths(params.layouts(specs, rules, mesh.shape)))

    def make(path: str, spec: ParamSpec) -> Tensor:
        offset, shape = box(spec.shape, layouts[path], mesh)
        local = torch.empty(shape, dtype=dtype, device=mesh.device_type)
        if local.numel():
            count = shape[0] if spec.axes[:1] == "L" else 1
            for i in range(count):
                one: Box = ((offset[0] + i, *offset[1:]), (1, *shape[1:])) if spec.axes[:1] == "L" else (offset, shape)
                (local[i : i + 1] if spec.axes[:1] == "L" else local).copy_(model.read(path, one))
        return to_global(local, spec.shape, layouts[path], mesh)

    return tree.map_paths(make, specs)


def abstract_params(model: Model) -> tree.Tree:
    """Make our parameter tree without memory, in the types that the files have."""
    make = partial(torch.empty, device="meta")
    return tree.map_paths(lambda path, spec: make(spec.shape, dtype=model.dtypes[path]), decoder.specs(model.config))


def _names(row: Row, spec: ParamSpec) -> list[str]:
    return [row.name.format(i) for i in range(spec.shape[0])] if spec.axes[:1] == "L" else [row.name]


def _same(source: Source, head: str, embed: str) -> None:
    """Refuse a head that is said to be the embedding but differs from it."""
    count = source.tensors[embed].shape[0]
    equal = source.tensors[head].shape == source.tensors[embed].shape
    for start in range(0, count if equal else 0, ROWS):
        cut = operator.itemgetter(slice(start, min(start + ROWS, count)))
        a, b = source.read(head, cut), source.read(embed, cut)
        equal = equal and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if not equal:
        raise UserError(f"{source.folder}: tie_word_embeddings is true, but the files hold a {head} that differs from {embed}.")
