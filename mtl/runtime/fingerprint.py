"""A name for what a function computes: the same in every process that would trace it alike, another where a constant or a source differs.

The compiler's cache can then find a traced graph without tracing it.
"""

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

PLAIN = (type(None), bool, int, float, complex, str, bytes, Path, enum.Enum, torch.dtype, torch.device, type(...), range)
LIBRARIES = ("torch", "triton", "flash-attn", "flash-attn-4", "transformer-engine")


class Unknown(TypeError):
    """A value whose part in a function cannot be told."""


def fingerprint(fn: Any) -> str | None:
    """Hash a function: its code, every value that it closes over, and all sources of the program. None where a value cannot be told.

    Fields of dataclasses that are hidden from their repr (memos, callbacks) do not count.
    """
    digest = hashlib.sha256(sources())
    try:
        for word in words(fn, {}):
            digest.update(f"{word}\0".encode())
    except Unknown:
        return None
    return digest.hexdigest()[:32]


def words(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[str]:
    """Spell a value, the values inside it, and what functions close over."""
    if isinstance(value, PLAIN):
        yield f"{type(value).__qualname__} {value!r}"
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}"
        return
    seen[id(value)] = (len(seen), value)  # held, so that no other value gets its id
    yield f"{type(value).__module__}.{type(value).__qualname__}"
    for name, part in parts(value):
        yield name
        yield from words(part, seen)


def parts(value: Any) -> list[tuple[str, Any]]:
    """Take a value apart."""
    if isinstance(value, types.ModuleType | type):
        return [("name", f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value.__name__)]
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, types.BuiltinFunctionType) and not isinstance(value.__self__, torch.Tensor):
        return [("name", f"{value.__module__}.{value.__qualname__}")]
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("function", value.__func__)]
    if isinstance(value, functools.partial):
        return [("function", value.func), ("args", value.args), ("keywords", value.keywords)]
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr]
    if isinstance(value, Mapping):
        return [("entry", entry) for entry in value.items()]
    if isinstance(value, Set):
        return [("member", member) for member in sorted(value, key=repr)]
    if isinstance(value, Sequence):
        return [("item", item) for item in value]
    if isinstance(value, DeviceMesh):
        return [("mesh", repr(value)), ("ranks", str(value.mesh.tolist()))]
    if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):  # pyright: ignore[reportPrivateUsage]
        return [("name", str(value))]
    if (
        isinstance(value, torch.Tensor)
        or not hasattr(value, "__dict__")
        or type(value).__module__.partition(".")[0] in ("torch", "builtins")
    ):
        raise Unknown(type(value).__qualname__)
    return list(vars(value).items())


def _function(value: types.FunctionType) -> list[tuple[str, Any]]:
    code = value.__code__
    where = f"{value.__module__}.{value.__qualname__}:{code.co_firstlineno}"
    cells = [cell.cell_contents for cell in value.__closure__ or () if not _empty(cell)]
    return [("name", where), ("code", code.co_code), ("closure", cells), ("defaults", value.__defaults__), ("named", value.__kwdefaults__)]


def _empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


@functools.cache
def sources() -> bytes:
    """Hash, once, the program's own sources (all loaded modules outside the libraries, mtl's whole folder) and the libraries' versions."""
    digest = hashlib.sha256(sys.version.encode())
    for name in LIBRARIES:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\0".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    libraries = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    files = {Path(file).resolve() for module in list(sys.modules.values()) if isinstance(file := getattr(module, "__file__", None), str)}
    own = {file for file in files if file.suffix == ".py" and not any(file.is_relative_to(place) for place in libraries)}
    own |= {file.resolve() for file in Path(__file__).parent.parent.rglob("*.py")}
    for file in sorted(file for file in own if file.is_file()):  # some of torch's modules name files that are not there
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.digest()
