"""What a traced function gives, shapes and structure alone, kept on disk: a start that finds it need not run the function to learn them."""

import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

from mtl import tree

Meta = tuple[list[int], list[int], str, str]
"""Shape, strides, type and device of a tensor."""


class Result(NamedTuple):
    """The tensors that a function gave, and how they make up its result; whether it left its arguments alone, and gave no part of them."""

    metas: list[Meta]
    structure: Any
    pure: bool

    def make(self) -> tuple[Tensor, ...]:
        """Make tensors like them, in the fake mode that is on."""
        return tuple(
            torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device) for shape, stride, dtype, device in self.metas
        )


def versions(leaves: Sequence[Tensor]) -> list[int]:
    """Count how often each tensor was written; -1 where that is not counted."""
    return [-1 if x.is_inference() else x._version for x in leaves]  # pyright: ignore[reportPrivateUsage]


class Writes(TorchDispatchMode):
    """Notes whether operations write to some tensors: what an operation of a library's own writes to is not counted where no values are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watch some tensors."""
        super().__init__()
        self.held, self.seen = {_memory(x) for x in tensors}, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        given = [*zip(func._schema.arguments, args, strict=False), *((a, (kwargs or {}).get(a.name)) for a in func._schema.arguments)]
        written = [x for a, x in given if a.alias_info is not None and a.alias_info.is_write]
        tensors = [x for w in written for x in (w if isinstance(w, list | tuple) else [w]) if isinstance(x, Tensor)]
        self.seen = self.seen or any(_memory(x) in self.held for x in tensors)
        return func(*args, **(kwargs or {}))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell Dynamo to compile although this is active."""
        return True


def is_pure(before: list[int], leaves: Sequence[Tensor], out: Sequence[Any]) -> bool:
    """Tell whether a call wrote to none of its arguments, and gave tensors with memory of their own."""
    held = {_memory(x) for x in leaves}
    return -1 not in before and versions(leaves) == before and not any(_memory(x) in held for x in out if isinstance(x, Tensor))


def asks_for_shapes(leaves: Sequence[Tensor]) -> Literal["no", "shapes", "effects"]:
    """Tell what a call wants to know, if nobody records its operations or takes derivatives.

    Dynamo's call wants shapes: its tensors are fake. AOTAutograd's first wants to know of changed arguments too: its tensors are
    functional, and nothing is recorded yet.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return "no"
    if all(type(x) is FakeTensor for x in leaves):
        return "shapes"
    return "effects" if all(type(x) is FunctionalTensor for x in leaves) and get_proxy_mode() is None else "no"


def recall(key: str, leaves: Sequence[Tensor]) -> Result | None:
    """Find what a function of this name gave for arguments of these shapes."""
    try:
        found = json.loads(_file(key, leaves).read_text())
        return Result([tuple(meta) for meta in found["metas"]], tree.read_structure(found["structure"]), found["writes_nothing"])
    except (OSError, ValueError, KeyError):
        return None


def remember(key: str, leaves: Sequence[Tensor], result: Result) -> None:
    """Keep what a function gave; where the folder cannot be written to, or the structure not be spelled, nothing is kept."""
    file = _file(key, leaves)
    try:
        text = json.dumps({"metas": result.metas, "structure": tree.spell_structure(result.structure), "writes_nothing": result.pure})
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        own.write_text(text)
        own.replace(file)
    except (OSError, NotImplementedError):
        return


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def metas(tensors: Sequence[Tensor]) -> list[Meta]:
    """Describe tensors."""
    return [(list(x.shape), list(x.stride()), str(x.dtype).removeprefix("torch."), str(x.device)) for x in tensors]


def _file(key: str, leaves: Sequence[Tensor]) -> Path:
    folder: str = importlib.import_module("torch._inductor.runtime.runtime_utils").cache_dir()
    asked = hashlib.sha256(json.dumps(metas(leaves)).encode()).hexdigest()[:16]
    return Path(folder) / "mtl" / f"{key}-{asked}.json"
