"""tiktoken's files: a line a token, its bytes in base64 and its rank."""

import base64
import binascii
from pathlib import Path

import numpy as np

from mtl.data.tokenizers.byte_level import encode_all, encoder
from mtl.data.tokenizers.gpt2 import PATTERN as GPT2
from mtl.data.tokenizers.vocabulary import Vocabulary, named_roles, read_text
from mtl.errors import UserError, unknown

_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K = rf"{_SHORT}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_SHORT}?|{_WORD}{_UPPER}+{_LOWER}*{_SHORT}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2, "r50k": GPT2, "p50k": GPT2, "cl100k": CL100K, "o200k": O200K, "llama3": CL100K}
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
)  # fmt: skip
KNOWN: dict[tuple[str, int], dict[str, int]] = {
    ("gpt2", 50256): {"<|endoftext|>": 50256},
    ("r50k", 50256): {"<|endoftext|>": 50256},
    ("p50k", 50280): {"<|endoftext|>": 50256},
    ("cl100k", 100256): {n: 100257 + i for i, n in enumerate(("<|endoftext|>", *_FIM))} | {"<|endofprompt|>": 100276},
    ("o200k", 199998): {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ("llama3", 128000): {name: 128000 + i for i, name in enumerate(_LLAMA3)},
}
"""Special tokens of the published files, by pattern and number of ranks: the files themselves do not hold them."""


def open_tiktoken(model: Path, pattern: str | None = None) -> Vocabulary:
    """Open ranks; ``pattern`` is one of ``PATTERNS`` or a regular expression, by default told from the file's name."""
    name = pattern or next((p for p in PATTERNS if model.name.startswith(p)), None)
    if name is None:
        raise UserError(f"--model {model} does not say how text is cut into words: give --pattern {', '.join(PATTERNS)} or an expression.")
    if name not in PATTERNS and name.isidentifier():
        raise unknown("pattern", name, PATTERNS)
    ranks = _read_ranks(model)
    special = KNOWN.get((name, len(ranks)), {})
    core = encoder(ranks, PATTERNS.get(name, name))
    border = max(ranks.values()) + 1
    pieces = {rank: piece for piece, rank in ranks.items()}
    size = max([*pieces, *special.values()]) + 1

    def decode(ids: list[int]) -> str:
        return b"".join(pieces.get(i, b"") for i in ids).decode("utf-8", "replace")

    return Vocabulary(size, lambda texts: encode_all(core, border, texts), decode, special, named_roles(special))


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path, "--model").splitlines(), 1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"--model {path} line {number}: expected a base64 token, a space and a rank, found {line[:60]!r}.") from None
    values = np.array(sorted(ranks.values()))
    if not ranks or values[0] < 0 or (np.diff(values) == 0).any():
        raise UserError(f"--model {path} holds no tokens, or a rank twice or below 0: is it a tiktoken file?")
    if lacking := [b for b in range(256) if bytes([b]) not in ranks]:
        raise UserError(f"--model {path} lacks a token for byte 0x{lacking[0]:02x}: is it a tiktoken file?")
    return ranks
