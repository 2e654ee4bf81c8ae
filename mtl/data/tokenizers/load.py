"""From a kind and its files to a tokenizer: one row a kind."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl.data.tokenizers.gpt2 import open_gpt2
from mtl.data.tokenizers.huggingface import open_huggingface
from mtl.data.tokenizers.sentencepiece import open_sentencepiece
from mtl.data.tokenizers.simple import open_bytes, open_null
from mtl.data.tokenizers.tiktoken import open_tiktoken
from mtl.data.tokenizers.tokenizer import Tokenizer, assign, extend
from mtl.data.tokenizers.vocabulary import Vocabulary
from mtl.data.tokenizers.wordpiece import open_bert_cased, open_bert_uncased
from mtl.errors import UserError, unknown

KINDS: Mapping[str, tuple[Callable[..., Vocabulary], tuple[str, ...], tuple[str, ...]]] = {
    "bytes": (open_bytes, (), ()),
    "null": (open_null, ("vocab_size",), ()),
    "gpt2": (open_gpt2, ("vocab", "merges"), ()),
    "huggingface": (open_huggingface, ("model",), ()),
    "sentencepiece": (open_sentencepiece, ("model",), ()),
    "tiktoken": (open_tiktoken, ("model",), ("pattern",)),
    "bert-cased": (open_bert_cased, ("vocab",), ()),
    "bert-uncased": (open_bert_uncased, ("vocab",), ()),
}
"""Kind: what opens it, what it must be given, what it may be given."""
FILES = ("vocab", "merges", "model")


def load(
    kind: str,
    *,
    special: Sequence[str] = (),
    eod: str | None = None,
    bos: str | None = None,
    pad: str | None = None,
    **given: str | Path | int | None,
) -> Tokenizer:
    """Open a tokenizer of a ``kind`` from its files (vocab, merges, model) and options (vocab_size, pattern); see ``KINDS``.

    ``special`` adds tokens by name; ``eod``, ``bos`` and ``pad`` name the tokens of these roles where the files say nothing or otherwise.
    """
    if kind not in KINDS:
        raise unknown("tokenizer", kind, KINDS)
    open_it, must, may = KINDS[kind]
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in must:
        if name not in values:
            raise UserError(f"tokenizer {kind!r} needs {_flag(name)}.")
    for name, value in values.items():
        if name not in must + may:
            takes = ", ".join(map(_flag, must + may)) or "no files"
            raise UserError(f"tokenizer {kind!r} has no use for {_flag(name)} {value}: it takes {takes}.")
    values = {name: _file(kind, value) if name in FILES else value for name, value in values.items()}
    for name in set(values) & set(FILES):
        if not values[name].exists():
            raise UserError(f"{_flag(name)} {values[name]} does not exist.")
    found = open_it(**values)
    files = {name: value for name, value in values.items() if name in FILES}
    options = {name: value for name, value in values.items() if name not in FILES}
    plain = Tokenizer(kind, found, found.size, dict(found.special), dict(found.roles), files=files, options=options)
    return assign(extend(plain, special), {"eod": eod, "bos": bos, "pad": pad})


def _file(kind: str, value: str | Path) -> Path:
    path = Path(value).resolve()
    return path / "tokenizer.json" if kind == "huggingface" and path.is_dir() else path


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
