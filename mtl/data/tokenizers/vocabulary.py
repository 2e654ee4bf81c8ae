"""What one tokenizer library gives, before special tokens are added: every kind of tokenizer is a function that makes this."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtl.errors import UserError

Ids = npt.NDArray[np.integer[Any]]
Flat = tuple[Ids, Ids]
"""The ids of several texts, one text after another, and how many ids each text has."""

NAMES = {
    "eod": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|eot_id|>", "<|im_end|>", "[EOS]", "[SEP]"),
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "<|startoftext|>", "[BOS]", "[CLS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"),
}
"""The names by which an end of document, a beginning and a padding are known, where a tokenizer's files do not say."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids 0..size-1, how plain text becomes ids, and how ids that are not special become text."""

    size: int
    encode: Callable[[Sequence[str]], Flat]
    decode: Callable[[list[int]], str]
    special: Mapping[str, int] = field(default_factory=dict[str, int])
    """Tokens that stand for no text."""
    roles: Mapping[str, str] = field(default_factory=dict[str, str])
    """Which special token is the end of a document (eod), the beginning (bos), the padding (pad), as far as the files say."""
    lookup: Callable[[str], int | None] = lambda name: None
    """Find a piece of the vocabulary by its name."""


def flatten(lists: Iterable[Sequence[int] | Ids]) -> Flat:
    """Join the ids of several texts."""
    parts = [np.asarray(ids, dtype=np.int32) for ids in lists]
    lengths = np.array([len(p) for p in parts], dtype=np.int64)
    return (np.concatenate(parts) if parts else np.zeros(0, np.int32)), lengths


def named_roles(special: Mapping[str, int]) -> dict[str, str]:
    """Guess roles from well-known names."""
    found = {role: next((n for n in names if n in special), None) for role, names in NAMES.items()}
    return {role: name for role, name in found.items() if name is not None}


def read_text(path: Path, what: str) -> str:
    """Read a tokenizer's text file."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}). Is it the right file?") from None


def read_json(path: Path, what: str) -> Any:
    """Read a tokenizer's JSON file."""
    try:
        return json.loads(read_text(path, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON ({error}). Is it the right file?") from None
