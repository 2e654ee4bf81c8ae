"""A chat corpus in memory: every conversation as tokens and weights, none longer than the sequence, and everything counted."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from mtl.data.chat.encode import Encoded, encode
from mtl.data.chat.rows import Chat
from mtl.data.chat.templates import Template
from mtl.data.tokenizers import Tokenizer
from mtl.errors import UserError

OnLong = Literal["split", "truncate", "skip"]
AT_ONCE = 1000
"""Rows that are tokenised in one call."""


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    """Places that the documents take in sequences."""
    target_tokens: int = 0
    """Tokens that count in the loss."""
    longest: int = 0
    """The longest row in tokens, before it was cut."""
    long: int = 0
    """Rows longer than the sequence."""
    skipped: int = 0
    """Of these, rows left out by --on-long skip."""
    cut_tokens: int = 0
    """Tokens that truncating or skipping left out."""
    without_target: int = 0
    """Pieces of long rows that were left out because no token of them is a target."""

    def __str__(self) -> str:
        """Say it in one line."""
        shown = {name: value for name, value in asdict(self).items() if value or name in ("rows", "documents", "long")}
        return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in shown.items())


@dataclass(frozen=True)
class Corpus:
    """Documents one after the other: document d has the tokens and weights from starts[d] to starts[d + 1]."""

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]
    counts: Counts = field(default_factory=Counts)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Give the places that each document takes: one less than its tokens, since the last one is a target alone."""
        return np.diff(self.starts) - 1

    def document(self, index: int) -> Encoded:
        """Give one document."""
        here = slice(self.starts[index], self.starts[index + 1])
        return Encoded(self.tokens[here], self.weights[here])


def make_corpus(
    chats: Iterable[Chat], template: Template, tokenizer: Tokenizer, weights: Mapping[str, float], seq_len: int, on_long: OnLong
) -> Corpus:
    """Write out, tokenise and cut every conversation. A row without a target is an error."""
    counts = Counts()
    found: list[Encoded] = []
    for group in _groups(chats):
        for chat, whole in zip(group, encode(tokenizer, [template.write(chat) for chat in group], weights), strict=True):
            if not whole.weights[1:].any():
                roles = " or ".join(role for role, weight in weights.items() if weight)
                raise UserError(f"{chat.where}: the row has no target: no message of role {roles} with any words (see --role-weights).")
            counts.rows += 1
            found += _cut(_trimmed(whole), seq_len, on_long, counts)
    if not found:
        raise UserError(f"the chat data has no documents ({counts}): give other files, or another --on-long or --train.seq-len.")
    counts.documents = len(found)
    counts.tokens = sum(len(d.tokens) - 1 for d in found)
    counts.target_tokens = sum(int(np.count_nonzero(d.weights[1:])) for d in found)
    starts = np.concatenate([[0], np.cumsum([len(d.tokens) for d in found])])
    return Corpus(np.concatenate([d.tokens for d in found]), np.concatenate([d.weights for d in found]), starts, counts)


def _groups(chats: Iterable[Chat]) -> Iterator[list[Chat]]:
    group: list[Chat] = []
    for chat in chats:
        group.append(chat)
        if len(group) == AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _trimmed(whole: Encoded) -> Encoded:
    """Leave out what follows the last target: it would be computed for nothing."""
    stop = int(np.flatnonzero(whole.weights)[-1]) + 1
    return Encoded(whole.tokens[:stop], whole.weights[:stop])


def _cut(whole: Encoded, seq_len: int, on_long: OnLong, counts: Counts) -> list[Encoded]:
    """Bring a document to at most ``seq_len`` places. Pieces share a token, so that every target stays one, once."""
    size = len(whole.tokens)
    counts.longest = max(counts.longest, size)
    if size - 1 <= seq_len:
        return [whole]
    counts.long += 1
    if on_long == "skip":
        counts.skipped += 1
        counts.cut_tokens += size
        return []
    starts = range(0, size - 1, seq_len) if on_long == "split" else (0,)
    pieces = [Encoded(whole.tokens[s : s + seq_len + 1], whole.weights[s : s + seq_len + 1]) for s in starts]
    counts.cut_tokens += size - (seq_len + 1) if on_long == "truncate" else 0
    kept = [_trimmed(p) for p in pieces if p.weights[1:].any()]
    counts.without_target += len(pieces) - len(kept)
    return kept
