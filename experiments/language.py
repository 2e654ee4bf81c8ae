"""The tokenizer and the template of a fine-tune that names none: those that the model of ``--init`` brings."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.initial import BESIDE, TOKENIZER, built_in, newest
from mtl import checkpoint
from mtl.data import tokenizers
from mtl.data.tokenizers import description
from mtl.data.tokenizers.vocabulary import read_json
from mtl.errors import UserError

Kind = Literal["bytes", "gpt2", "huggingface", "sentencepiece", "tiktoken", "bert-cased", "bert-uncased"]


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer of the model."""

    kind: Kind | None = None
    """gpt2 takes vocab and merges; huggingface (tokenizer.json), sentencepiece and tiktoken take model; bert takes vocab. By default what
    the model of --init brings; without --init bytes."""
    vocab: Path | None = None
    merges: Path | None = None
    model: Path | None = None
    pattern: str | None = None
    """For tiktoken: its name or regular expression, where the file's name does not tell it."""
    special: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = ()
    """Special tokens to add, beside those that the template writes; the model grows by what it lacks."""
    bos: str | None = None
    """The token that begins a conversation, where the tokenizer does not say it."""
    eos: str | None = None
    """The token that ends an answer in the templates llama2 and mistral, where the tokenizer does not say it."""
    pad: str | None = None


def settled(asked: TokenizerSettings, template: str | None, init: str | None) -> tuple[TokenizerSettings, str]:
    """Fill in what the flags leave open."""
    folder = None
    if init is not None:
        folder = Path(init.removeprefix("hf:")) if init.startswith("hf:") else checkpoint.inspect(newest(Path(init))).item / BESIDE
    if asked.kind is None:
        for name in ("vocab", "merges", "model", "pattern"):
            if getattr(asked, name) is not None:
                raise UserError(f"--tokenizer.{name} is {getattr(asked, name)}, but not of which kind it is: give --tokenizer.kind too.")
        asked = with_names(brought(init, folder), asked) if init is not None and folder is not None else replace(asked, kind="bytes")
    return asked, template or (str(folder) if folder is not None and has_template(folder) else "chatml")


def brought(init: str, folder: Path) -> TokenizerSettings:
    """Find the tokenizer of the model that ``--init`` names: described in a checkpoint, or as files in a folder of Hugging Face."""
    contents = None if init.startswith("hf:") else checkpoint.inspect(newest(Path(init)))
    if contents is not None and TOKENIZER in contents.files:
        said = description.loads(contents.read(TOKENIZER).decode(), f"{TOKENIZER} of {contents.path}")
        opened = tokenizers.reopen(said, folder)
        names = {"bos": said.roles.get("bos"), "eos": said.roles.get("eod"), "pad": said.roles.get("pad")}
        return TokenizerSettings(kind(said.kind, init), special=said.added, **opened.files, **names, **said.options)  # pyright: ignore
    if (folder / "tokenizer.json").exists():
        return TokenizerSettings("huggingface", model=folder / "tokenizer.json")
    if (folder / "tokenizer.model").exists():
        return TokenizerSettings("sentencepiece", model=folder / "tokenizer.model")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return TokenizerSettings("gpt2", vocab=folder / "vocab.json", merges=folder / "merges.txt")
    if contents is not None and built_in(contents):
        return TokenizerSettings("bytes")
    raise UserError(f"--init {init} brings no tokenizer: give --tokenizer.kind and its files.")


def kind(name: str, init: str) -> Kind:
    """Refuse the one kind that knows no words."""
    if name == "null":
        raise UserError(f"--init {init} brings a model of numbers (tokenizer null), which has no words for chats.")
    return name  # pyright: ignore[reportReturnType]


def with_names(found: TokenizerSettings, asked: TokenizerSettings) -> TokenizerSettings:
    """Add the special tokens that were asked for, and prefer the names that were."""
    special = tuple(dict.fromkeys((*found.special, *asked.special)))
    return replace(found, special=special, bos=asked.bos or found.bos, eos=asked.eos or found.eos, pad=asked.pad or found.pad)


def has_template(folder: Path) -> bool:
    """Tell whether a folder's tokenizer brings a chat template."""
    if (folder / "chat_template.jinja").exists():
        return True
    path = folder / "tokenizer_config.json"
    said = read_json(path, "the tokenizer's") if path.exists() else None
    return isinstance(said, dict) and "chat_template" in said
