"""GPT-2's vocab.json and merges.txt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl.data.extra import need
from mtl.data.tokenizers.byte_level import BYTE_OF, as_bytes, encode_all, encoder, missing_bytes
from mtl.data.tokenizers.vocabulary import Flat, Vocabulary, flatten, named_roles, read_json, read_text
from mtl.errors import UserError

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's words; the possessive form of the original pattern, which means the same and is faster."""


def open_gpt2(vocab: Path, merges: Path) -> Vocabulary:
    """Open a byte-level vocabulary; what neither bytes nor merges make is a special token."""
    ids = _read_vocab(vocab)
    pairs = _read_merges(merges, ids)
    plain = {c for c in BYTE_OF if c in ids} | {a + b for a, b in pairs}
    special = {name: i for name, i in ids.items() if name not in plain}
    size = max(ids.values()) + 1
    names = {i: as_bytes(name) or b"" for name, i in ids.items()}

    def decode(some: list[int]) -> str:
        return b"".join(names[i] for i in some).decode("utf-8", "replace")

    known = frozenset(BYTE_OF[c] for c in BYTE_OF if c in ids)
    slow = _by_merges(ids, pairs)
    encode = _by_ranks(ids, pairs) if len(known) == 256 and _ranks_suffice(slow, ids, pairs) else None

    def encode_slowly(texts: Sequence[str]) -> Flat:
        if len(known) < 256:
            missing_bytes(known, texts)
        return flatten(e.ids for e in slow.encode_batch_fast(list(texts), add_special_tokens=False))

    return Vocabulary(size, encode or encode_slowly, decode, special, named_roles(special), special.get)


def _read_vocab(path: Path) -> dict[str, int]:
    ids = read_json(path, "--vocab")
    if not isinstance(ids, dict) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids.values()):
        raise UserError(f"--vocab {path} is no GPT-2 vocabulary: expected a JSON object from token to id.")
    if sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f"--vocab {path}: its {len(ids)} ids are not 0 to {len(ids) - 1}, each once.")
    return ids


def _read_merges(path: Path, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(read_text(path, "--merges").replace("\r\n", "\n").split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"--merges {path} line {number}: {line[:60]!r} is not two tokens parted by one space.")
        for name in (*pair, "".join(pair)):
            if name not in ids:
                raise UserError(f"--merges {path} line {number}: --vocab has no token {name!r}: do the two belong together?")
            if as_bytes(name) is None:
                raise UserError(f"--merges {path} line {number}: {name!r} is not written in GPT-2's byte alphabet.")
        pairs.append((pair[0], pair[1]))
    return pairs


def _by_merges(ids: Mapping[str, int], pairs: list[tuple[str, str]]) -> Any:
    library = need("tokenizers", "tokenizer 'gpt2'")
    model = library.models.BPE(vocab=dict(ids), merges=pairs)
    slow = library.Tokenizer(model)
    slow.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return slow


def _by_ranks(ids: Mapping[str, int], pairs: list[tuple[str, str]]) -> Any:
    """Encode with tiktoken, whose merge order is the rank: bytes first, then merges in their order."""
    order = [*BYTE_OF, *(a + b for a, b in pairs)]
    core = encoder({as_bytes(name) or b"": rank for rank, name in enumerate(order)}, PATTERN)
    table = np.array([ids[name] for name in order], dtype=np.int32)
    given = None if (table == np.arange(len(order))).all() else table
    return lambda texts: encode_all(core, len(order), texts, given)


def _ranks_suffice(slow: Any, ids: Mapping[str, int], pairs: list[tuple[str, str]]) -> bool:
    """Tell whether merging whatever has a rank (tiktoken) is the same as merging the listed pairs.

    It is when no two merges make one token, a token's parts rank before it, and every token encodes to itself: by induction over
    ranks, the parts of a token's bytes at its rank are then the listed pair and no other.
    """
    rank = dict.fromkeys(BYTE_OF, -1)
    for i, (a, b) in enumerate(pairs):
        if a + b in rank or a not in rank or b not in rank:
            return False
        rank[a + b] = i
    library = need("tokenizers", "tokenizer 'gpt2'")
    alone = library.Tokenizer(slow.model)
    made = [a + b for a, b in pairs]
    return all(e.ids == [ids[name]] for e, name in zip(alone.encode_batch_fast(made), made, strict=True))
