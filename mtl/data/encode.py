"""From a block of rows to tokens: parse, check, tokenize. What is wrong with a row is kept with its number."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl.data.indexed import Tokens
from mtl.data.sources import Block
from mtl.data.tokenizers import Flat, Tokenizer
from mtl.errors import UserError

_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # pyright: ignore
"""Parse one JSON value at a place of a text: the core of json.loads, which takes twice as long for short rows."""


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
    rows, parse = _rows(block)
    for number, row in enumerate(rows, block.first_row + 1):
        try:
            texts = parse(row, key)
        except RowError as error:
            errors.append((number, str(error)))
            continue
        if texts is not None:
            documents.append(texts)
            numbers.append(number)
    (ids, lengths), documents = _encode(documents, numbers, tokenizer, errors)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise RuntimeError(f"tokenizer {tokenizer.kind!r} gave ids from {ids.min()} to {ids.max()} of {tokenizer.vocab_size}")
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])[lengths > 0]
    lengths = lengths[lengths > 0]
    counts = np.bincount(owner, minlength=len(documents))
    if append_eod and tokenizer.eod is not None:
        ids, lengths = _with_eod(ids, lengths, np.cumsum(counts[counts > 0]) - 1, tokenizer.eod)
    return Encoded(ids.astype(dtype), lengths, counts, sorted(errors))


def _with_eod(ids: Tokens, lengths: Tokens, last: Tokens, eod: int) -> Flat:
    """End the sequences numbered ``last`` with ``eod``."""
    longer = lengths.copy()
    longer[last] += 1
    ends = np.zeros(int(longer.sum()), dtype=bool)
    ends[np.cumsum(longer)[last] - 1] = True
    whole = np.full(len(ends), eod, dtype=np.int32)
    whole[~ends] = ids
    return whole, longer


def _encode(
    documents: list[list[str]], numbers: list[int], tokenizer: Tokenizer, errors: list[tuple[int, str]]
) -> tuple[Flat, list[list[str]]]:
    """Tokenize all texts at once; where that fails, find the documents at fault and leave them out."""
    try:
        return tokenizer.encode_flat([text for document in documents for text in document]), documents
    except UserError:
        good: list[list[str]] = []
        for number, document in zip(numbers, documents, strict=True):
            try:
                tokenizer.encode_flat(document)
                good.append(document)
            except UserError as error:
                errors.append((number, str(error)))
        return tokenizer.encode_flat([text for document in good for text in document]), good


def _rows(block: Block) -> tuple[list[Any], Callable[[Any, str], list[str] | None]]:
    """Give a block's rows, and what makes the texts of one (None: no document at all)."""
    if isinstance(block.rows, list):
        return block.rows, lambda value, key: _texts(value, "column", key)
    if block.format == "whole":
        return [block.rows], lambda row, _: [_decode(row)]
    lines: list[str] | list[bytes]
    try:
        lines = block.rows.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = block.rows.split(b"\n")
    if block.rows.endswith(b"\n"):
        lines.pop()
    return lines, _json_row if block.format == "jsonl" else _text_row


def _json_row(line: str | bytes, key: str) -> list[str] | None:
    text = _decode(line).strip(" \t\r")
    if not text:
        return None
    try:
        row, end = _scan(text, 0)
        if end != len(text):
            raise RowError(f"not JSON: something follows the first value, at character {end + 1}")
    except StopIteration as stop:
        raise RowError(f"not JSON: expected a value at character {int(stop.value) + 1}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from None
    except ValueError as error:
        raise error if isinstance(error, RowError) else RowError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but {_kind(row)}")
    if key not in row:
        raise RowError(f"no key {key!r} (it has {', '.join(map(repr, list(row)[:8])) or 'none'}; choose one with --key)")
    return _texts(row[key], "key", key)


def _text_row(line: str | bytes, key: str) -> list[str] | None:
    text = _decode(line).removesuffix("\r")
    return [text] if text and not text.isspace() else None


def _texts(value: Any, what: str, key: str) -> list[str]:
    if isinstance(value, bytes):
        value = _decode(value)
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise RowError(f"{what} {key!r} holds {_kind(text)}, not text")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):04x}"
                raise RowError(f"{what} {key!r} holds half a surrogate pair ({half}), which is no character") from None
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
