"""Find a rules table by name, by file or by module, and choose one for a mesh."""

import importlib
import pkgutil
from pathlib import Path

from mtl.errors import UserError, unknown
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import Rules, from_module, read_table


def names() -> list[str]:
    """List the tables that come with the library."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_"))


def load(name: str) -> Rules:
    """Load a shipped table by name, a user's by path (``my/table.py``, read as data) or by module (``my.table``, imported)."""
    if name.endswith(".py") or "/" in name:
        return read_table(Path(name), _shipped())
    if name in names():
        return _shipped()[name]
    if "." in name:
        try:
            return from_module(importlib.import_module(name), _shipped())
        except ImportError as error:
            raise UserError(f"rules {name!r} name a module that cannot be imported: {error}.") from None
    raise unknown("rules table", name, names())


def choose(mesh: MeshShape) -> str:
    """Name the table that fits the axes in use best."""
    used = set(mesh.active()) - {"pipe"}  # which every table uses
    if not used:
        return "single"
    if "tensor" in used:
        if used <= {"tensor", "replica"}:
            return "tensor"
        return "fsdp_context_tensor" if "context" in used else "fsdp_tensor"
    if "context" in used:
        return "context"
    return {frozenset({"replica"}): "ddp", frozenset({"fsdp"}): "fsdp"}.get(frozenset(used), "hsdp")


def world_axis(rules: Rules) -> str:
    """Name the mesh axis that takes all devices where nothing else is said: the last one the table uses."""
    return ([axis for axis in rules.used() if axis != "pipe"] or ["replica"])[-1]


def _shipped() -> dict[str, Rules]:
    found: dict[str, Rules] = {}

    def take(name: str) -> None:
        module = importlib.import_module(f"sharding_rules.{name}")
        base = getattr(module, "BASE", None)
        if base is not None and base not in found:
            take(base)
        found[name] = from_module(module, found)

    for name in names():
        take(name)
    return found
