"""Byte-level byte-pair encoding: GPT-2's printable names of bytes, and encoding by the fastest library."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl.data.extra import need
from mtl.data.tokenizers.vocabulary import Flat, Ids, flatten
from mtl.errors import UserError

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _PRINTABLE]
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}
"""GPT-2 writes every byte as one printable character."""
NAME_OF = {b: c for c, b in BYTE_OF.items()}


BORDER = "\ufffemtl border\uffff"
"""Parts texts that are encoded in one call. No beginning of it is an end of it, so that it is found nowhere but where it was put."""


def as_bytes(name: str) -> bytes | None:
    """Give the bytes that a vocabulary entry stands for, None for a name that is not written in the byte alphabet."""
    try:
        return bytes(BYTE_OF[c] for c in name)
    except KeyError:
        return None


def encoder(ranks: Mapping[bytes, int], pattern: str) -> Any:
    """Make tiktoken's encoder. Its one special token, behind the last rank, is the border between texts; no text's names are special."""
    tiktoken = need("tiktoken", "this tokenizer")
    try:
        border = {BORDER: max(ranks.values()) + 1}
        return tiktoken.Encoding("mtl", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=border)
    except ValueError as error:
        raise UserError(f"the tokenizer's pattern or ranks do not work: {error}.") from None


def encode_all(core: Any, border: int, texts: Sequence[str], ids: Ids | None = None) -> Flat:
    """Encode with tiktoken, all texts in one call: borders between them end words, and a call costs more than a short text.

    ``border`` is the border's rank; ``ids`` maps ranks to ids where they differ.
    """
    if not texts:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    joined = BORDER.join(texts)
    try:
        if joined.count(BORDER) != len(texts) - 1:  # some text holds the border itself
            plain, lengths = flatten(core.encode_ordinary(text) for text in texts)
            return (plain if ids is None else ids[plain]), lengths
        found: Ids = core.encode_to_numpy(joined, allowed_special={BORDER}, disallowed_special=())
    except Exception:
        raise
    except BaseException as error:  # tiktoken's core ends in a Rust panic where its pattern needs too much stack
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise UserError(f"the tokenizer library gave up on texts of up to {max(map(len, texts)):,} characters ({error}).") from None
    at_border = found == border
    ends = np.append(np.flatnonzero(at_border), len(found))
    lengths = np.diff(ends, prepend=-1) - 1
    plain = found[~at_border] if len(texts) > 1 else found
    return (plain if ids is None else ids[plain]), lengths


def missing_bytes(known: frozenset[int], texts: Sequence[str]) -> None:
    """Refuse text with bytes that a vocabulary has no token for."""
    have = bytes(sorted(known))
    for text in texts:
        if rest := text.encode("utf-8").translate(None, have):
            raise UserError(f"the vocabulary has no token for byte 0x{rest[0]:02x} ({NAME_OF[rest[0]]!r}), which the text holds.")
