"""Sharding rules: tables from logical axes to mesh axes, read as data and checked in full before anything runs."""

import ast
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mtl.axes import ACTIVATION_AXES, MESH_AXES, PARAM_AXES
from mtl.errors import UserError, unknown
from mtl.sharding.layout import Axes, Layout
from mtl.sharding.mesh import MeshShape

_TABLES = ("STORE", "COMPUTE", "ACT")
_SETTINGS = {"WHOLE": (), "PAD": (), "GATHER": "layer", "ORDER": "contiguous"}


@dataclass(frozen=True)
class Rules:
    """One parallel layout.

    ``store`` places parameters at rest, ``compute`` places them in use (the difference is FSDP), ``act`` places activations.
    Names in ``whole`` keep only as many of their axes as divide; names in ``pad`` may be cut unevenly and are padded in compute.
    ``gather`` says when weights go from store to compute: each layer, or once a step. ``order`` is the order of the sequence over
    the devices that share it.
    """

    name: str
    store: Mapping[str, Axes]
    compute: Mapping[str, Axes]
    act: Mapping[str, Axes]
    whole: tuple[str, ...] = ()
    pad: tuple[str, ...] = ()
    gather: str = "layer"
    order: str = "contiguous"

    def used(self) -> Axes:
        """List the mesh axes that the tables mention, in mesh order."""
        found = {a for table in (self.store, self.compute, self.act) for axes in table.values() for a in axes}
        return tuple(axis for axis in MESH_AXES if axis in found)

    def layout(self, table: str, axes: Sequence[str], shape: Sequence[int], mesh: MeshShape, what: str) -> Layout:
        """Place an array of logical ``axes`` and global ``shape`` by one of the tables store, compute, act.

        Axis pipe splits the first dimension that lists it: the layers, or what has no layers along another, if that divides.
        """
        where = f"{what} {tuple(shape)} with axes ({', '.join(axes)}) on the mesh {mesh} under rules {self.name!r}"
        dims: list[Axes] = []
        for name, size in zip(axes, shape, strict=True):
            rows = getattr(self, table)
            if name not in rows:
                raise UserError(f"{where}: no row for {name!r} in the {table.upper()} table.")
            split = tuple(a for a in rows[name] if getattr(mesh, a) > 1 and not (a == "pipe" and any("pipe" in d for d in dims)))
            if "pipe" in split and name != "layers" and size % math.prod(getattr(mesh, a) for a in split):
                split = tuple(a for a in split if a != "pipe")
            dims.append(self._fit(name, size, split, mesh, where))
        used = [a for axes_ in dims for a in axes_]
        for axis in used:
            if used.count(axis) > 1:
                raise UserError(f"{where}: mesh axis {axis!r} splits two dimensions; each axis can split one.")
        return Layout(tuple(dims))

    def _fit(self, name: str, size: int, axes: Axes, mesh: MeshShape, where: str) -> Axes:
        def parts(axes: Axes) -> int:
            return math.prod(getattr(mesh, a) for a in axes)

        if name in self.whole:
            return next(axes[:n] for n in range(len(axes), -1, -1) if size % parts(axes[:n]) == 0)
        if name in self.pad and len(axes) == 1:
            return axes
        if size % parts(axes):
            sizes = " x ".join(f"{a}={getattr(mesh, a)}" for a in axes)
            fitting = ", ".join(str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0)
            together = f"{axes[0]} could be" if len(axes) == 1 else "their product could be"
            raise UserError(
                f"{where}: {name} of size {size} does not divide by {sizes}. Change the size or those mesh axes: {together} {fitting}."
            )
        return axes


def check_mesh(rules: Rules, mesh: MeshShape) -> None:
    """Refuse a mesh with an axis that the table never uses."""
    idle = [axis for axis in mesh.active() if axis not in rules.used()]
    if idle:
        spare = ", ".join(f"{axis}={getattr(mesh, axis)}" for axis in idle)
        raise UserError(
            f"rules {rules.name!r} never use mesh axis {spare}: its devices would all do the same work. "
            f"Set it to 1 or choose rules that use it (these use: {', '.join(rules.used()) or 'no axis'})."
        )


def read_table(path: Path, bases: Mapping[str, Rules]) -> Rules:
    """Read a table from a Python file of literal assignments, as data: nothing in it is run."""
    try:
        body = ast.parse(path.read_text(), str(path)).body
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the rules table {path}: {error}") from None
    values: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if not isinstance(node, ast.Assign) or not isinstance(target, ast.Name):
            raise UserError(f"{path}:{node.lineno}: a rules table holds assignments of plain values alone, such as STORE = {{...}}.")
        try:
            values[target.id] = ast.literal_eval(node.value)
        except ValueError:
            raise UserError(f"{path}:{node.lineno}: {target.id} is not a plain value (dicts, tuples and strings).") from None
    return make_rules(path.stem, values, bases)


def from_module(module: types.ModuleType, bases: Mapping[str, Rules]) -> Rules:
    """Take a table from a module's upper-case names."""
    values = {name: value for name, value in vars(module).items() if name.isupper()}
    return make_rules(module.__name__.rpartition(".")[2], values, bases)


def make_rules(name: str, values: Mapping[str, Any], bases: Mapping[str, Rules]) -> Rules:
    """Build rules from a table's names and values, on top of the table that BASE names, and check that they are total."""
    known = (*_TABLES, *_SETTINGS, "BASE")
    for key in values:
        if key not in known:
            raise unknown(f"setting in rules table {name!r}", key, known)
    base: Rules | None = None
    if "BASE" in values:
        if values["BASE"] not in bases:
            raise unknown(f"BASE in rules table {name!r}", str(values["BASE"]), bases)
        base = bases[values["BASE"]]
    tables = {
        key.lower(): _rows(name, key, values.get(key, {}), PARAM_AXES if key != "ACT" else ACTIVATION_AXES, getattr(base, key.lower(), {}))
        for key in _TABLES
    }
    settings = {key.lower(): values.get(key, getattr(base, key.lower(), default)) for key, default in _SETTINGS.items()}
    rules = Rules(name, **tables, **settings)
    for key, choices in {"GATHER": ("layer", "step"), "ORDER": ("contiguous", "zigzag")}.items():
        if settings[key.lower()] not in choices:
            raise unknown(f"{key} in rules table {name!r}", str(settings[key.lower()]), choices)
    _check_agreement(rules)
    for key in ("whole", "pad"):
        for logical in _names(name, key.upper(), settings[key]):
            if logical not in (*PARAM_AXES, *ACTIVATION_AXES):
                raise unknown(f"logical axis in {key.upper()} of rules table {name!r}", logical, {*PARAM_AXES, *ACTIVATION_AXES})
    return rules


def _check_agreement(rules: Rules) -> None:
    """Refuse tables whose parts contradict each other."""
    for logical in rules.compute:
        rest, use = rules.store[logical], rules.compute[logical]
        if rest[: len(use)] != use:
            raise UserError(f"rules table {rules.name!r}: STORE[{logical!r}] is {rest}, which must start with COMPUTE[{logical!r}], {use}.")
        if logical != "embed" and rules.act.get(logical, use) != use:
            raise UserError(
                f"rules table {rules.name!r}: ACT[{logical!r}] is {rules.act[logical]} but COMPUTE[{logical!r}] is {use}. "
                "A weight's axis and the activations it makes lie alike: give both the same mesh axes."
            )
    if rules.compute["embed"] or rules.act["embed"]:
        raise UserError(f"rules table {rules.name!r}: embed must stay whole in COMPUTE and ACT; split it in STORE alone.")
    for key, rows in (("STORE", rules.store), ("ACT", rules.act)):
        for logical, axes in rows.items():
            if "core" not in logical and list(axes) != sorted(axes, key=MESH_AXES.index):
                raise UserError(f"rules table {rules.name!r}: {key}[{logical!r}] is {axes}; its axes must come in mesh order {MESH_AXES}.")


def _names(name: str, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple) or not all(isinstance(v, str) for v in cast("tuple[Any, ...]", value)):
        raise UserError(f"{key} in rules table {name!r} is {value!r}: expected a tuple of names, such as ('fsdp',).")
    return cast("tuple[str, ...]", value)


def _rows(name: str, key: str, rows: Any, known: Iterable[str], base: Mapping[str, Axes]) -> Mapping[str, Axes]:
    if not isinstance(rows, dict):
        raise UserError(f"{key} in rules table {name!r} is {rows!r}: expected a dict from logical axis to a tuple of mesh axes.")
    known = tuple(known)
    merged: dict[str, Axes] = {**base, **cast("dict[str, Axes]", rows)}
    for logical, axes in merged.items():
        if logical not in known:
            raise unknown(f"logical axis in {key} of rules table {name!r}", str(logical), known)
        for axis in _names(name, f"{key}[{logical!r}]", axes):
            if axis not in MESH_AXES:
                raise unknown(f"mesh axis in {key}[{logical!r}] of rules table {name!r}", axis, MESH_AXES)
    lacking = [logical for logical in known if logical not in merged]
    if lacking:
        raise UserError(
            f"rules table {name!r}: {key} has no row for {', '.join(lacking)}. Every logical axis needs one; () keeps it whole."
        )
    return types.MappingProxyType(merged)
