"""Megatron-LM's .bin/.idx corpora, memory-mapped: opening reads the header alone, every access checks what it gives."""

import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtl.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, element type, sequences, document entries (documents + 1): 34 bytes, then the arrays without padding."""
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"),
    5: np.dtype("<i8"), 6: np.dtype("<f8"), 7: np.dtype("<f4"), 8: np.dtype("<u2"),
}  # fmt: skip
"""Element types by Megatron's code."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
Tokens = npt.NDArray[Any]


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the element type that Megatron-LM would."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """Name the file of the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Name the file of the lengths."""
    return Path(f"{prefix}.idx")


@dataclass(frozen=True)
class Indexed:
    """A corpus: sequences of tokens, and documents made of sequences. ``open_indexed`` makes one."""

    prefix: str
    tokens: Tokens
    """All tokens, one after another."""
    lengths: Tokens
    """Tokens of every sequence (int32, on disk)."""
    pointers: Tokens
    """Byte at which every sequence starts (int64, on disk, not aligned)."""
    document_ends: Tokens
    """0, then the number of sequences up to the end of every document (int64, on disk, not aligned)."""
    modes: Tokens | None
    """What every sequence is (0 text, 1 image) in multimodal corpora."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a token."""
        return self.tokens.dtype

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.document_ends) - 1

    @property
    def total(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    def start(self, sequence: int) -> int:
        """Give the place of a sequence's first token among all tokens; ``start(sequences)`` is their number."""
        if not 0 <= sequence <= self.sequences:
            raise IndexError(f"sequence {sequence} of {self.sequences}")
        if sequence == self.sequences:
            return self.total
        place, rest = divmod(int(self.pointers[sequence]), self.dtype.itemsize)
        if rest or not 0 <= place <= self.total:
            raise self._broken(sequence, f"starts at byte {int(self.pointers[sequence])}")
        return place

    def sequence(self, index: int, first: int = 0, stop: int | None = None) -> Tokens:
        """Give a sequence's tokens, or those from ``first`` to ``stop``, without copying."""
        begin, end = self.start(index), self.start(index + 1)
        length = int(self.lengths[index])
        if end - begin != length or length < 0:
            raise self._broken(index, f"has length {length} but the next one starts {end - begin} tokens later")
        stop = length if stop is None else stop
        if not 0 <= first <= stop <= length:
            raise IndexError(f"tokens {first} to {stop} of a sequence of {length}")
        return self.tokens[begin + first : begin + stop]

    def document_sequences(self, document: int) -> range:
        """Give the sequences of a document."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        first, stop = int(self.document_ends[document]), int(self.document_ends[document + 1])
        if not 0 <= first <= stop <= self.sequences:
            raise UserError(
                f"{idx_path(self.prefix)} is damaged: document {document} holds sequences {first} to {stop} of {self.sequences}."
            )
        return range(first, stop)

    def document(self, document: int) -> Tokens:
        """Give a document's tokens: all its sequences, without copying."""
        at = self.document_sequences(document)
        begin, end = self.start(at.start), self.start(at.stop)
        if begin > end:
            raise self._broken(at.start, f"starts after sequence {at.stop}")
        return self.tokens[begin:end]

    def holding(self, place: int, near: int | None = None) -> int:
        """Find the sequence that holds the token at a place among all tokens; ``near`` is a sequence to search from, in few pages."""
        if not 0 <= place < self.total:
            raise IndexError(f"token {place} of {self.total}")
        byte = place * self.dtype.itemsize
        found = bisect_right(self.pointers, byte, *self._around(byte, near)) - 1
        if found < 0 or not self.start(found) <= place < self.start(found + 1):
            raise self._broken(max(found, 0), f"does not hold token {place}, which its neighbours do not hold either")
        return found

    def _around(self, byte: int, near: int | None) -> tuple[int, int]:
        """Give bounds of what starts at a byte or before, in steps that double away from ``near``, or from where the mean length says.

        A bisection of the whole would read a page of the file for each of its first steps; this one reads pages that lie together.
        """
        last, mean = self.sequences - 1, len(self.tokens) * self.dtype.itemsize / self.sequences
        if near is None:
            near = min(last, int(byte / mean))
            for _ in range(2):
                near = min(max(near + int((byte - int(self.pointers[near])) / mean), 0), last)
        first = stop = min(max(near, 0), self.sequences)
        step = 1
        while first > 0 and self.pointers[first - 1] > byte:
            first, step = max(0, first - step), 2 * step
        step = 1
        while stop < self.sequences and self.pointers[stop] <= byte:
            stop, step = min(self.sequences, stop + step), 2 * step
        return first, stop

    def verify(self, vocab_size: int | None = None, block: int = 1 << 20) -> Iterator[int]:
        """Read everything and refuse what does not fit together or lies outside the vocabulary; gives the bytes read, block by block."""
        size, place = self.dtype.itemsize, 0
        for i in range(0, self.sequences, block):
            lengths = np.array(self.lengths[i : i + block], dtype=np.int64)
            starts = place + np.concatenate([[0], np.cumsum(lengths * size)])
            wrong = (lengths < 0) | (self.pointers[i : i + block] != starts[:-1])
            if wrong.any():
                j = i + int(wrong.argmax())
                raise self._broken(j, f"has length {self.lengths[j]} and starts at byte {self.pointers[j]}, not {starts[j - i]}")
            place = int(starts[-1])
            yield 12 * len(lengths)
        for i in range(0, self.documents, block):
            steps = np.diff(np.array(self.document_ends[i : i + block + 1]))
            if (steps < 0).any():
                j = i + int((steps < 0).argmax())
                raise UserError(f"{idx_path(self.prefix)} is damaged: document {j} ends before it begins.")
            yield 8 * len(steps)
        if self.dtype.kind not in "iu":
            return
        for i in range(0, self.total, block):
            check_ids(self.tokens[i : i + block], vocab_size, f"{bin_path(self.prefix)}", i)
            yield len(self.tokens[i : i + block]) * size

    def _broken(self, sequence: int, what: str) -> UserError:
        return UserError(f"{idx_path(self.prefix)} is damaged: sequence {sequence} {what}. Build or copy the corpus again.")


def check_ids(tokens: Tokens, vocab_size: int | None, where: str, place: int = 0) -> None:
    """Refuse ids below 0 or outside the vocabulary; ``place`` is where the first token stands."""
    wrong = tokens < 0
    if vocab_size is not None:
        wrong |= tokens >= vocab_size
    if wrong.any():
        j = int(wrong.argmax())
        known = "ids are not negative" if vocab_size is None else f"the vocabulary is 0 to {vocab_size - 1}"
        raise UserError(f"{where}: token {place + j:,} is {tokens[j]}, but {known}. Does the corpus belong to this tokenizer?")


def open_indexed(prefix: str | Path, multimodal: bool | None = None) -> Indexed:
    """Open ``prefix``.bin and ``prefix``.idx without reading more than headers, whatever their size.

    ``multimodal`` says whether modes follow the index; by default the file's size says it.
    """
    prefix = str(prefix)
    path = idx_path(prefix)
    try:
        return _open(prefix, path, multimodal)
    except OSError as error:
        place = error.filename or path
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        needs = f"{bin_path(prefix).name} and {idx_path(prefix).name}"
        raise UserError(f"{place} {why}: corpus {prefix} is the two files {needs}, named without suffix.") from None


def _open(prefix: str, path: Path, multimodal: bool | None) -> Indexed:
    size = path.stat().st_size
    if size < HEADER.size:
        raise UserError(f"{path} is cut short: it has {size} bytes, fewer than the header's {HEADER.size}.")
    with path.open("rb") as file:
        magic, version, code, sequences, entries = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC:
        raise UserError(f"{path} is no Megatron index: it begins with {magic!r}, not {MAGIC!r}.")
    if version != VERSION:
        raise UserError(f"{path} has version {version}: only version {VERSION} is known.")
    if code not in DTYPES:
        raise UserError(f"{path} names element type {code}: known are {', '.join(f'{c} ({t.name})' for c, t in DTYPES.items())}.")
    if entries < 1:
        raise UserError(f"{path} has no document entries: there must be at least one. It is damaged.")
    plain = HEADER.size + 12 * sequences + 8 * entries
    if multimodal is None:
        multimodal = size == plain + sequences and sequences > 0
    asked = plain + (sequences if multimodal else 0)
    if size != asked:
        what = "cut short" if size < asked else "longer than it says"
        counts = f"{sequences} sequences and {entries - 1} documents"
        raise UserError(f"{path} is {what}: its header speaks of {counts}, so of {asked} bytes; it has {size}. Copy it again.")
    return _map(prefix, DTYPES[code], sequences, entries, bool(multimodal))


def _map(prefix: str, dtype: np.dtype[Any], sequences: int, entries: int, multimodal: bool) -> Indexed:
    """Map the arrays and check their ends."""
    raw = np.memmap(idx_path(prefix), mode="r", dtype=np.uint8)
    at = HEADER.size
    lengths: Tokens = np.ndarray((sequences,), "<i4", raw, at)
    pointers: Tokens = np.ndarray((sequences,), "<i8", raw, at + 4 * sequences)
    ends: Tokens = np.ndarray((entries,), "<i8", raw, at + 12 * sequences)
    modes: Tokens | None = np.ndarray((sequences,), "i1", raw, at + 12 * sequences + 8 * entries) if multimodal else None
    path = bin_path(prefix)
    size = path.stat().st_size
    said = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    if said != size or size % dtype.itemsize:
        how = "cut short" if size < said else "of another length than its index says"
        raise UserError(f"{path} is {how}: {idx_path(prefix)} speaks of {said} bytes, it has {size}. Build or copy the corpus again.")
    if sequences and pointers[0] != 0:
        raise UserError(f"{idx_path(prefix)} is damaged: its first sequence starts at byte {pointers[0]}, not 0.")
    if ends[0] != 0 or ends[-1] != sequences:
        raise UserError(f"{idx_path(prefix)} is damaged: its documents hold sequences {ends[0]} to {ends[-1]}, not 0 to {sequences}.")
    tokens = np.memmap(path, mode="r", dtype=dtype).view(np.ndarray) if size else np.zeros(0, dtype)
    return Indexed(prefix, tokens, lengths, pointers, ends, modes)
