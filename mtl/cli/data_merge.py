"""Merge corpora of one element type and one tokenizer into one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mtl.cli.bytes_bar import BytesBar
from mtl.data.merge import merge


@dataclass(frozen=True)
class Merge:
    """Merge corpora of one element type and one tokenizer into one."""

    input: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="CORPORA")]
    """The corpora's names without .bin and .idx; their documents follow one another in this order."""
    output: Path
    """The new corpus's name."""
    overwrite: bool = False
    """Replace a corpus of this name."""


def main(arguments: list[str]) -> None:
    """Merge corpora."""
    flags = tyro.cli(Merge, args=arguments, prog="mtl data merge")
    with BytesBar(flags.output.name) as bar:
        done = merge(flags.input, flags.output, flags.overwrite, lambda at, total: bar.move(at, total, at))
    print(f"{flags.output}.bin and .idx: {done.documents:,} documents, {done.sequences:,} sequences, {done.tokens:,} tokens")
