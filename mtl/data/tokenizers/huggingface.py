"""Hugging Face's tokenizer.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl.data.extra import need
from mtl.data.tokenizers.vocabulary import Flat, Vocabulary, flatten, named_roles, read_json
from mtl.errors import UserError


def open_huggingface(model: Path) -> Vocabulary:
    """Open a tokenizer.json. Roles come from a tokenizer_config.json beside it, else from well-known names."""
    library = need("tokenizers", "tokenizer 'huggingface'")
    try:
        inner: Any = library.Tokenizer.from_file(str(model))
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"--model {model} is no tokenizer.json: {error}.") from None
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # their names in plain text are text
    size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not size:
        raise UserError(f"--model {model} holds an empty vocabulary.")
    special = {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    roles = {**named_roles(special), **_roles(model.with_name("tokenizer_config.json"), special)}

    def encode(texts: Sequence[str]) -> Flat:
        return flatten(e.ids for e in inner.encode_batch_fast(list(texts), add_special_tokens=False))

    return Vocabulary(size, encode, lambda ids: inner.decode(ids, skip_special_tokens=False), special, roles, inner.token_to_id)


def _roles(path: Path, special: dict[str, int]) -> dict[str, str]:
    if not path.exists():
        return {}
    said = read_json(path, "the tokenizer's")
    found: dict[str, str] = {}
    for role, key in (("eod", "eos_token"), ("bos", "bos_token"), ("pad", "pad_token")):
        token = said.get(key) if isinstance(said, dict) else None
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and name in special:
            found[role] = name
    return found
