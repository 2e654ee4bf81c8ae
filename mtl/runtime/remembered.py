"""What a traced function gives, shapes and structure alone, kept on disk: a start that finds it need not run the function to learn them."""

import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mtl import tree

Meta = tuple[list[int], list[int], str, str]
"""Shape, strides, type and device of a tensor."""


class Result(NamedTuple):
    """The tensors that a function gave, and how they make up its result."""

    metas: list[Meta]
    structure: Any

    def make(self) -> tuple[Tensor, ...]:
        """Make tensors like them, in the fake mode that is on."""
        return tuple(
            torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device) for shape, stride, dtype, device in self.metas
        )


def only_asks_for_shapes(leaves: Sequence[Tensor]) -> bool:
    """Tell whether a call is Dynamo's, which wants to know shapes: its tensors are fake, nobody records operations or takes derivatives."""
    derived = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    return not derived and all(type(x) is FakeTensor for x in leaves)


def recall(key: str, leaves: Sequence[Tensor]) -> Result | None:
    """Find what a function of this name gave for arguments of these shapes."""
    try:
        found = json.loads(_file(key, leaves).read_text())
        return Result([tuple(meta) for meta in found["metas"]], tree.read_structure(found["structure"]))
    except (OSError, ValueError, KeyError):
        return None


def remember(key: str, leaves: Sequence[Tensor], out: Sequence[Any], structure: Any) -> None:
    """Keep what a function gave; where the folder cannot be written to, or the structure not be spelled, nothing is kept."""
    if not all(isinstance(x, Tensor) for x in out):
        return
    file = _file(key, leaves)
    try:
        text = json.dumps({"metas": [_meta(x) for x in out], "structure": tree.spell_structure(structure)})
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        own.write_text(text)
        own.replace(file)
    except (OSError, NotImplementedError):
        return


def _meta(x: Tensor) -> Meta:
    return list(x.shape), list(x.stride()), str(x.dtype).removeprefix("torch."), str(x.device)


def _file(key: str, leaves: Sequence[Tensor]) -> Path:
    folder: str = importlib.import_module("torch._inductor.runtime.runtime_utils").cache_dir()
    asked = hashlib.sha256(json.dumps([_meta(x) for x in leaves]).encode()).hexdigest()[:16]
    return Path(folder) / "mtl" / f"{key}-{asked}.json"
