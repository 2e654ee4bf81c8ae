"""The flags that name a tokenizer, shared by commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mtl.data import tokenizers

Kind = Literal["bytes", "null", "gpt2", "huggingface", "sentencepiece", "tiktoken", "bert-cased", "bert-uncased"]


@dataclass(frozen=True)
class TokenizerFlags:
    """A tokenizer and its files."""

    tokenizer: Kind | None = None
    """gpt2 takes --vocab and --merges; huggingface (tokenizer.json), sentencepiece and tiktoken take --model; bert takes --vocab; null --vocab-size."""  # noqa: E501
    vocab: Path | None = None
    merges: Path | None = None
    model: Path | None = None
    vocab_size: int | None = None
    """For null: the numbers are 0 to this minus 1, and this number itself ends a document."""
    pattern: str | None = None
    """For tiktoken: gpt2, r50k, p50k, cl100k, o200k, llama3 or a regular expression; by default told from the file's name."""
    special: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = ()
    """Special tokens to add, in the order of their ids."""
    eod: str | None = None
    """Name of the end-of-document token, where the tokenizer does not say it."""
    bos: str | None = None
    pad: str | None = None

    def load(self) -> tokenizers.Tokenizer | None:
        """Open the tokenizer, None where none is named."""
        if self.tokenizer is None:
            return None
        files = {"vocab": self.vocab, "merges": self.merges, "model": self.model}
        return tokenizers.load(
            self.tokenizer, special=self.special, eod=self.eod, bos=self.bos, pad=self.pad,
            vocab_size=self.vocab_size, pattern=self.pattern, **files,
        )  # fmt: skip
