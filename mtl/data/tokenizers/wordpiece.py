"""BERT's WordPiece vocabularies, cased and uncased."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl.data.extra import need
from mtl.data.tokenizers.vocabulary import Flat, Vocabulary, flatten, named_roles, read_text
from mtl.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")


def open_bert_cased(vocab: Path) -> Vocabulary:
    """Open a vocab.txt of one piece a line, keeping case and accents."""
    return _open(vocab, lowercase=False)


def open_bert_uncased(vocab: Path) -> Vocabulary:
    """Open a vocab.txt of one piece a line; text is put in lower case without accents first."""
    return _open(vocab, lowercase=True)


def _open(path: Path, lowercase: bool) -> Vocabulary:
    library = need("tokenizers", "tokenizer 'bert'")
    pieces = [line.removesuffix("\r") for line in read_text(path, "--vocab").removesuffix("\n").split("\n")]
    ids = {piece: i for i, piece in enumerate(pieces)}
    if "[UNK]" not in ids:
        raise UserError(f"--vocab {path} holds no [UNK]: is it a WordPiece vocabulary, one piece a line?")
    if len(ids) < len(pieces):
        twice = next(p for i, p in enumerate(pieces) if ids[p] != i)
        raise UserError(f"--vocab {path} holds {twice!r} twice (line {pieces.index(twice) + 1} first).")
    inner: Any = library.Tokenizer(library.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    inner.normalizer = library.normalizers.BertNormalizer(lowercase=lowercase)
    inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    inner.decoder = library.decoders.WordPiece(prefix="##")

    def encode(texts: Sequence[str]) -> Flat:
        return flatten(e.ids for e in inner.encode_batch_fast(list(texts), add_special_tokens=False))

    special = {name: ids[name] for name in SPECIAL if name in ids}
    return Vocabulary(len(pieces), encode, inner.decode, special, named_roles(special), ids.get)
