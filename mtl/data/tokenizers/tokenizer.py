"""A tokenizer: a vocabulary and its special tokens. Names of special tokens inside plain text are plain text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mtl.data.tokenizers.vocabulary import Flat, Ids, Vocabulary
from mtl.errors import UserError


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; ``load`` makes one."""

    kind: str
    vocabulary: Vocabulary
    vocab_size: int
    """Ids are 0..vocab_size-1, special tokens included."""
    special: Mapping[str, int]
    """Id of every special token by name."""
    roles: Mapping[str, str]
    """Names of the eod, bos and pad tokens, of those that there are."""
    added: tuple[str, ...] = ()
    """Special tokens that were asked for beside the vocabulary's own, in the order asked."""
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    options: Mapping[str, str | int] = field(default_factory=dict[str, str | int])

    @property
    def eod(self) -> int | None:
        """The id that ends a document."""
        return self._role("eod")

    @property
    def bos(self) -> int | None:
        """The id that begins a document."""
        return self._role("bos")

    @property
    def pad(self) -> int | None:
        """The id of padding; never that of the end of a document."""
        pad = self._role("pad")
        return None if pad == self.eod else pad

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Give the ids of many texts, each as an array."""
        ids, lengths = self.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Give the ids of many texts, one text after another, and how many each has: the fast way."""
        return self.vocabulary.encode(texts)

    def encode_marked(self, text: str) -> list[int]:
        """Give the ids of a text in which the names of special tokens stand for themselves (text that a template wrote)."""
        ids: list[int] = []
        for i, part in enumerate(self._names.split(text) if self.special else [text]):
            if i % 2:
                ids.append(self.special[part])
            elif part:
                ids.extend(self.encode(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Give the text of some ids; special tokens show as their names."""
        whole = [int(i) for i in ids]
        outside = next((i for i in whole if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise UserError(f"id {outside} lies outside the vocabulary of tokenizer {self.kind!r} (0 to {self.vocab_size - 1}).")
        parts: list[str] = []
        run: list[int] = []
        for i in whole:
            if i in self._by_id:
                parts += [self.vocabulary.decode(run), self._by_id[i]] if run else [self._by_id[i]]
                run = []
            else:
                run.append(i)
        return "".join(parts) + (self.vocabulary.decode(run) if run else "")

    @cached_property
    def _by_id(self) -> dict[int, str]:
        return {i: name for name, i in self.special.items()}

    @cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(re.escape(n) for n in sorted(self.special, key=lambda n: (-len(n), n))) + ")")

    def _role(self, role: str) -> int | None:
        name = self.roles.get(role)
        return None if name is None else self.special[name]


def extend(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """Add special tokens. A name that the vocabulary knows keeps its id; the others get the next free ids, in the order given."""
    special, size = dict(tokenizer.special), tokenizer.vocab_size
    for name in names:
        if not name:
            raise UserError("a special token's name is empty: give it a name, such as <|im_start|>.")
        if name in special:
            continue
        known = tokenizer.vocabulary.lookup(name)
        special[name] = size if known is None else known
        size += known is None
    new = tuple(name for name in special if name not in tokenizer.special)
    return replace(tokenizer, special=special, vocab_size=size, added=tokenizer.added + new)


def assign(tokenizer: Tokenizer, roles: Mapping[str, str | None]) -> Tokenizer:
    """Say by name which special tokens are eod, bos and pad; a name that does not exist is added."""
    given = {role: name for role, name in roles.items() if name is not None}
    tokenizer = extend(tokenizer, list(given.values()))
    whole = {**tokenizer.roles, **given}
    if "eod" in whole and whole.get("pad") == whole["eod"]:
        if "pad" in given:
            raise UserError(f"--pad {given['pad']} is the end-of-document token too: padding needs a token of its own, such as <pad>.")
        del whole["pad"]
    return replace(tokenizer, roles=whole)
