"""Merge corpora into one, as Megatron-LM's `add_index` does: sequences and documents one after another."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mtl.data.indexed import Indexed, open_indexed
from mtl.data.indexed_writer import IndexedWriter, Written
from mtl.data.tokenizers import beside, read
from mtl.data.tokenizers.description import SUFFIX, dumps
from mtl.errors import UserError

_TOKENS = 1 << 22
_DOCUMENTS = 1 << 16


def merge(
    inputs: Sequence[Path], output: Path, overwrite: bool = False, show: Callable[[int, int], None] = lambda done, total: None
) -> Written:
    """Write the corpora ``inputs``, in order, as ``output``; ``show`` gets bytes done and in all."""
    if not inputs:
        raise UserError("--input names no corpus.")
    corpora = [open_indexed(p) for p in inputs]
    first = corpora[0]
    for corpus in corpora:
        if corpus.prefix and Path(corpus.prefix).resolve() == output.resolve():
            raise UserError(f"--output {output} is one of the inputs. Choose another name.")
        if corpus.dtype != first.dtype:
            raise UserError(
                f"{corpus.prefix} holds {corpus.dtype.name} and {first.prefix} {first.dtype.name}: only corpora of one element type merge."
            )
        if (corpus.modes is None) != (first.modes is None) and corpus.sequences and first.sequences:
            raise UserError(f"of {corpus.prefix} and {first.prefix} one is multimodal and the other is not: they do not merge.")
    text = _description(inputs)
    total = sum(c.tokens.nbytes for c in corpora)
    writer = IndexedWriter(output, first.dtype, overwrite)
    try:
        done = 0
        for corpus in corpora:
            for begin, end in _pieces(corpus):
                done += _copy(writer, corpus, begin, end)
                show(done, total)
        writer.finish({SUFFIX: text})
    except BaseException as error:
        writer.abandon()
        if isinstance(error, OSError):
            raise UserError(f"merging into {output} failed: {error}. Nothing was changed.") from None
        raise
    return writer.written


def _description(inputs: Sequence[Path]) -> str | None:
    """Give the tokenizer's description that all inputs share, if they have one; refuse those that differ."""
    known = [(p, d) for p in inputs if (d := read(beside(p))) is not None]
    for path, found in known:
        if difference := found.differs(known[0][1]):
            raise UserError(f"{path} and {known[0][0]} were built with different tokenizers: {difference}. They do not merge.")
    return dumps(known[0][1]) if known and len(known) == len(inputs) else None


def _pieces(corpus: Indexed) -> list[tuple[int, int]]:
    """Cut a corpus into runs of documents of a few million tokens each (a long document is a piece of its own)."""
    pieces: list[tuple[int, int]] = []
    begin = 0
    while begin < corpus.documents:
        limit = min(begin + _DOCUMENTS, corpus.documents)
        start = corpus.start(int(corpus.document_ends[begin]))
        low, high = begin + 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            if corpus.start(int(corpus.document_ends[middle])) - start <= _TOKENS:
                low = middle
            else:
                high = middle - 1
        pieces.append((begin, low))
        begin = low
    return pieces


def _copy(writer: IndexedWriter, corpus: Indexed, begin: int, end: int) -> int:
    ends = np.array(corpus.document_ends[begin : end + 1])
    first, stop = int(ends[0]), int(ends[-1])
    counts = np.diff(ends)
    if (counts < 0).any() or not 0 <= first <= stop <= corpus.sequences:
        raise UserError(f"{corpus.prefix}.idx is damaged: documents {begin} to {end} do not follow one another.")
    lengths = np.array(corpus.lengths[first:stop], dtype=np.int64)
    place = corpus.start(first)
    starts = (place + np.cumsum(lengths) - lengths) * corpus.dtype.itemsize
    if (lengths < 0).any() or (starts != corpus.pointers[first:stop]).any():
        raise UserError(f"{corpus.prefix}.idx is damaged: sequences {first} to {stop} do not follow one another.")
    tokens = corpus.tokens[place : place + int(lengths.sum())]
    modes = None if corpus.modes is None else corpus.modes[first:stop]
    writer.add(tokens, lengths, counts, modes)
    return tokens.nbytes
