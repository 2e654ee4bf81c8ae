"""SentencePiece models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl.data.extra import need
from mtl.data.tokenizers.vocabulary import Flat, Vocabulary, flatten
from mtl.errors import UserError


def open_sentencepiece(model: Path) -> Vocabulary:
    """Open a model. Its control pieces are special tokens; eod is its </s>."""
    library = need("sentencepiece", "tokenizer 'sentencepiece'")
    processor: Any = library.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.read_bytes())
        size = processor.get_piece_size()
    except (RuntimeError, OSError) as error:
        raise UserError(f"--model {model} is no SentencePiece model ({str(error).strip() or 'it cannot be parsed'}).") from None
    if not size:
        raise UserError(f"--model {model} is no SentencePiece model (it has no pieces).")
    special = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
    ids = {"eod": processor.eos_id(), "bos": processor.bos_id(), "pad": processor.pad_id()}
    roles = {role: processor.id_to_piece(i) for role, i in ids.items() if i >= 0}

    def encode(texts: Sequence[str]) -> Flat:
        return flatten(processor.encode(text, out_type=int) for text in texts)

    def lookup(name: str) -> int | None:
        i = processor.piece_to_id(name)
        return i if 0 <= i < size and processor.id_to_piece(i) == name else None

    special |= {name: i for name in roles.values() if (i := lookup(name)) is not None}
    return Vocabulary(size, encode, processor.decode, special, roles, lookup)
