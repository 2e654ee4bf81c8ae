"""From a block of rows to tokens: parse, check, tokenize. What is wrong with a row is kept with its number."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl.data.indexed import Tokens
from mtl.data.sources import Block
from mtl.data.tokenizers import Ids, Tokenizer
from mtl.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """A block's documents, ready to be written."""

    tokens: Tokens
    lengths: Tokens
    counts: Tokens
    """Sequences of every document."""
    errors: list[tuple[int, str]]
    """Row numbers (from 1) and what is wrong with them."""


class RowError(ValueError):
    """A row that is no document."""


def encode_block(block: Block, tokenizer: Tokenizer, key: str, append_eod: bool, dtype: np.dtype[Any]) -> Encoded:
    """Turn a block into documents; a document is one text, or a list of texts that become sequences of their own."""
    errors: list[tuple[int, str]] = []
    documents: list[list[str]] = []
    numbers: list[int] = []
    for number, take in _rows(block, key):
        try:
            texts = take()
            if texts is not None:
                documents.append(texts)
                numbers.append(number)
        except RowError as error:
            errors.append((number, str(error)))
    ids = _encode(documents, numbers, tokenizer, errors)
    eod = np.array([tokenizer.eod], dtype=np.int32) if append_eod else None
    parts: list[Ids] = []
    lengths: list[int] = []
    counts: list[int] = []
    for sequences in ids:
        full = [s for s in sequences if len(s)]
        counts.append(len(full))
        parts += full
        lengths += [len(s) for s in full]
        if full and eod is not None:
            parts.append(eod)
            lengths[-1] += 1
    tokens = np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.zeros(0, dtype)
    return Encoded(tokens, np.array(lengths, dtype=np.int64), np.array(counts, dtype=np.int64), sorted(errors))


def _encode(
    documents: list[list[str]], numbers: list[int], tokenizer: Tokenizer, errors: list[tuple[int, str]]
) -> list[list[Ids]]:  # fmt: skip
    """Tokenize all texts at once; where that fails, one document after another to find which one is at fault."""
    flat = [text for document in documents for text in document]
    try:
        ids = iter(tokenizer.encode_batch(flat))
        return [[next(ids) for _ in document] for document in documents]
    except UserError:
        found: list[list[Ids]] = []
        for number, document in zip(numbers, documents, strict=True):
            try:
                found.append(tokenizer.encode_batch(document))
            except UserError as error:
                errors.append((number, str(error)))
        return found


def _rows(block: Block, key: str) -> list[tuple[int, Callable[[], list[str] | None]]]:
    """Give every row's number and what makes its texts (None: no document at all)."""
    first = block.first_row + 1
    if isinstance(block.rows, list):
        return [(first + i, lambda value=value: _texts(value, f"column {key!r}")) for i, value in enumerate(block.rows)]
    if block.format == "whole":
        data = block.rows
        return [(first, lambda: [_decode(data)])]
    lines: list[str] | list[bytes]
    try:
        lines = block.rows.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = block.rows.split(b"\n")
    if block.rows.endswith(b"\n"):
        lines.pop()
    take = _json_row if block.format == "jsonl" else _text_row
    return [(first + i, lambda line=line: take(line, key)) for i, line in enumerate(lines)]


def _json_row(line: str | bytes, key: str) -> list[str] | None:
    text = _decode(line)
    if not text or text.isspace():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but {_kind(row)}")
    if key not in row:
        raise RowError(f"no key {key!r} (it has {', '.join(map(repr, list(row)[:8])) or 'none'}; choose one with --key)")
    return _texts(row[key], f"key {key!r}")


def _text_row(line: str | bytes, key: str) -> list[str] | None:
    text = _decode(line).removesuffix("\r")
    return [text] if text and not text.isspace() else None


def _texts(value: Any, what: str) -> list[str]:
    if isinstance(value, bytes):
        value = _decode(value)
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise RowError(f"{what} holds {_kind(text)}, not text")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowError(f"{what} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character") from None
    return texts


def _decode(data: str | bytes) -> str:
    if isinstance(data, str):
        return data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte 0x{data[error.start]:02x} at {error.start} of the row)") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
