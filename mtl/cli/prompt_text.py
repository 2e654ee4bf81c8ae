"""What prompts and answers are written in: the tokenizer that a checkpoint holds, its end tokens, and files of prompts."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.initial import BESIDE, TOKENIZER, built_in
from mtl.checkpoint.contents import Contents
from mtl.data import tokenizers
from mtl.data.extra import need
from mtl.data.tokenizers import description
from mtl.errors import UserError

EMPTY: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Language:
    """Text to ids and back, tokens that end a text, and tokens that are no text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    ends: tuple[int, ...] = ()
    special: tuple[int, ...] = ()


def language(contents: Contents, given: str | None, vocab: int) -> Language:
    """Find the tokenizer: the one given (a folder, or "bytes"), else the checkpoint's; and the end tokens of its files."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in contents.files:
            if name.startswith(BESIDE):
                (folder / name.removeprefix(BESIDE)).write_bytes(contents.read(name))
        ends = end_tokens(folder)
        if given is None and TOKENIZER in contents.files:
            found = _described(contents, folder)
        elif given == "bytes" or (given is None and not any(folder.iterdir()) and built_in(contents)):
            found = _plain(tokenizers.load("bytes"), False)
        elif given is not None and not Path(given).is_dir():
            raise UserError(f"--tokenizer {given} is no folder: expected one with a tokenizer's files, or bytes.")
        else:
            found = open_folder(Path(given) if given else folder) or _none(f"{contents.path} has no tokenizer.")
    return dataclasses.replace(found, ends=ends) if ends else found


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Read the ids that end a text: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        said = _json(folder / name).get("eos_token_id")
        ids = said if isinstance(said, list) else [] if said is None else [said]
        if not all(isinstance(i, int) for i in ids):
            raise UserError(f"{name}: eos_token_id is {said!r}: expected a token's id or a list of them.")
        if ids:
            return tuple(ids)
    return ()


def open_folder(folder: Path) -> Language | None:
    """Open the tokenizer that lies in a folder as Hugging Face has it, or give None where there is none.

    A tokenizer.json says itself which tokens it puts around a text; the older kinds begin one as tokenizer_config.json says.
    """
    said = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        tokenizer = tokenizers.load("huggingface", model=folder / "tokenizer.json")
        library: Any = need("tokenizers", "tokenizer 'huggingface'")
        inner: Any = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
        inner.no_truncation()
        inner.no_padding()
        return dataclasses.replace(_plain(tokenizer, False), encode=lambda text: inner.encode(text).ids)
    if (folder / "tokenizer.model").exists():
        tokenizer = tokenizers.load("sentencepiece", model=folder / "tokenizer.model")
        return _plain(tokenizer, bool(said.get("add_bos_token", True)))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = tokenizers.load("gpt2", vocab=folder / "vocab.json", merges=folder / "merges.txt")
        return _plain(tokenizer, bool(said.get("add_bos_token", False)))
    return None


def read_prompts(path: Path, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Read a file of prompts, one a line; the lines of a .jsonl file are objects with prompt or prompt_ids."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}.") from None
    if path.suffix != ".jsonl":
        return [encode(line) for line in lines]
    prompts: list[list[int]] = []
    for i, line in enumerate(lines):
        try:
            said = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {i + 1} is no JSON: {error}.") from None
        text, ids = (said.get("prompt"), said.get("prompt_ids")) if isinstance(said, dict) else (None, None)
        if isinstance(ids, list) and all(isinstance(t, int) for t in ids):
            prompts.append(ids)
        elif isinstance(text, str):
            prompts.append(encode(text))
        else:
            raise UserError(f'{path}, line {i + 1} has neither "prompt" (text) nor "prompt_ids" (a list of ids).')
    return prompts


def _plain(tokenizer: tokenizers.Tokenizer, begin: bool) -> Language:
    first = [tokenizer.bos] if begin and tokenizer.bos is not None else []

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(i for i in ids if i < tokenizer.vocab_size)  # a padded vocabulary has ids that are no text

    ends = () if tokenizer.eod is None else (tokenizer.eod,)
    return Language(lambda text: [*first, *tokenizer.encode(text)], decode, ends, tuple(tokenizer.special.values()))


def _described(contents: Contents, folder: Path) -> Language:
    """Open the tokenizer that a run described in its checkpoint; its files lie where they were, or among those that came with the model."""
    try:
        said = description.loads(contents.read(TOKENIZER).decode(), f"{TOKENIZER} of {contents.path}")
        return _plain(tokenizers.reopen(said, folder), False)
    except UserError as error:
        return _none(str(error))


def _none(why: str) -> Language:
    def encode(text: str) -> list[int]:
        raise UserError(f"{why} Give a tokenizer's folder with --tokenizer, or prompts as --prompt-ids.")

    return Language(encode, lambda ids: " ".join(map(str, ids)) + " " if ids else "")


def _json(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return EMPTY
    try:
        said = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} of the checkpoint is no JSON: {error}.") from None
    return said if isinstance(said, dict) else EMPTY
