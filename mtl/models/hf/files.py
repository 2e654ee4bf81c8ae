"""A folder as Hugging Face lays it out: config.json, tokenizer files, and tensors in one safetensors file or several with an index."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtl.errors import UserError

CONFIG, GENERATION, SINGLE, INDEX = "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"
COMPANIONS = (
    GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "tiktoken.model", "tekken.json", "spiece.model",
)  # fmt: skip
"""Files that travel with a model unchanged."""

DTYPES: Mapping[str, torch.dtype] = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True)
class Stored:
    """One tensor: the file that holds it, its type as safetensors spells it, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """What a folder holds; no tensor is read yet."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    companions: Mapping[str, Path]

    def read(self, name: str, cut: Callable[[Any], Tensor]) -> Tensor:
        """Give ``cut(slice of a tensor)``, copied. The file is opened for this alone, so that its pages do not count as ours afterwards."""
        with _opened(self.tensors[name].file) as file:
            return cut(file.get_slice(name)).clone(memory_format=torch.contiguous_format)


def open_source(folder: Path) -> Source:
    """List a folder's files and tensors, or say what is wrong with it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected one with {CONFIG} and {SINGLE} (or several files and {INDEX}).")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}, which says what the model is.")
    config = read_json(folder / CONFIG)
    read_json(folder / GENERATION) if (folder / GENERATION).exists() else None
    companions = {name: folder / name for name in COMPANIONS if (folder / name).is_file()}
    companions |= {path.name: path for path in sorted(folder.glob("*.tiktoken"))}
    return Source(folder, config, _tensors(folder), companions)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: expected {{...}}.")
    return value


def _tensors(folder: Path) -> dict[str, Stored]:
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise UserError(f"{folder} has both {SINGLE} and {INDEX}, so it is not known which of them holds the model: remove one.")
    if single.exists():
        return _listed(single)
    if index.exists():
        return _indexed(folder, index)
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has its weights in {pickled[0]}: pickles, which can run any code when read, so mtl reads none. If you trust them, "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)."
        )
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: no weights were found.")


def _indexed(folder: Path, index: Path) -> dict[str, Stored]:
    told = read_json(index).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(f, str) and "/" not in f for f in told.values()):
        raise UserError(f"{index} has no weight_map from tensors to files beside it.")
    problems, found = list[str](), dict[str, Stored]()
    for name in sorted(set(told.values())):
        if not (folder / name).is_file():
            problems.append(f"file {name}: it is in the index, but not in the folder")
            continue
        held = _listed(folder / name)
        problems += [f"tensor {t}: in {name}, but not in the index" for t in held if told.get(t) != name]
        problems += [f"tensor {t}: the index says {name}, which has no such tensor" for t, f in told.items() if f == name and t not in held]
        found |= held
    if problems:
        raise UserError(f"{index} does not fit the files beside it.\n  " + listed(problems))
    return found


def _listed(path: Path) -> dict[str, Stored]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return {name: Stored(path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated, damaged or no safetensors file: {error}.") from None


def listed(problems: list[str], most: int = 40) -> str:
    """Join problems, one a line, up to so many."""
    return "\n  ".join(problems[:most] + ([f"... and {len(problems) - most} more"] if len(problems) > most else []))
