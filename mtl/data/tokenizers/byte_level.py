"""Byte-level byte-pair encoding: GPT-2's printable names of bytes, and encoding by the fastest library."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl.data.extra import need
from mtl.data.tokenizers.vocabulary import Ids
from mtl.errors import UserError

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _PRINTABLE]
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}
"""GPT-2 writes every byte as one printable character."""
NAME_OF = {b: c for c, b in BYTE_OF.items()}


def as_bytes(name: str) -> bytes | None:
    """Give the bytes that a vocabulary entry stands for, None for a name that is not written in the byte alphabet."""
    try:
        return bytes(BYTE_OF[c] for c in name)
    except KeyError:
        return None


def encoder(ranks: Mapping[bytes, int], pattern: str) -> Any:
    """Make tiktoken's encoder, without special tokens: it finds none in plain text."""
    tiktoken = need("tiktoken", "this tokenizer")
    try:
        return tiktoken.Encoding("mtl", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
    except ValueError as error:
        raise UserError(f"the tokenizer's pattern or ranks do not work: {error}.") from None


def encode_all(core: Any, texts: Sequence[str], ids: Ids | None = None) -> list[Ids]:
    """Encode with tiktoken; ``ids`` maps its ranks to ids where they differ."""
    try:
        found = [core.encode_to_numpy(text, disallowed_special=()) for text in texts]
    except Exception:
        raise
    except BaseException as error:  # tiktoken's core ends in a Rust panic where its pattern needs too much stack
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise UserError(f"the tokenizer library gave up on a text of {max(map(len, texts)):,} characters ({error}).") from None
    return found if ids is None else [ids[part] for part in found]


def missing_bytes(known: frozenset[int], texts: Sequence[str]) -> None:
    """Refuse text with bytes that a vocabulary has no token for."""
    have = bytes(sorted(known))
    for text in texts:
        if rest := text.encode("utf-8").translate(None, have):
            raise UserError(f"the vocabulary has no token for byte 0x{rest[0]:02x} ({NAME_OF[rest[0]]!r}), which the text holds.")


def identity(ids: Ids) -> bool:
    """Tell whether a table from rank to id changes nothing."""
    return bool(np.array_equal(ids, np.arange(len(ids))))
