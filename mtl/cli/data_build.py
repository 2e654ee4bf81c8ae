"""Build a corpus (.bin and .idx, Megatron-LM's format) from .jsonl, .txt and .parquet files."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from mtl.cli.bytes_bar import BytesBar
from mtl.cli.tokenizer_flags import TokenizerFlags
from mtl.data.build import Job, Progress, build
from mtl.data.tokenizers import KINDS
from mtl.errors import UserError
from mtl.runtime.workers import cores, one_thread_a_process


@dataclass(frozen=True)
class Build:
    """Build a corpus (.bin and .idx, Megatron-LM's format) from .jsonl, .txt and .parquet files.

    A build that was killed goes on when its command is repeated.
    """

    input: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")]
    """.jsonl, .txt (each also .gz or .zst) or .parquet; several make one corpus, in the order given."""
    output: Path
    """The corpus's name: OUTPUT.bin and OUTPUT.idx are written, and OUTPUT.tokenizer.json, the tokenizer's description."""
    tokenizer: Annotated[TokenizerFlags, tyro.conf.arg(name="")] = field(default_factory=TokenizerFlags)
    key: str = "text"
    """Key (or column) that holds the text; a list of texts makes one document of several sequences."""
    append_eod: bool = False
    """End every document that is not empty with the end-of-document token."""
    txt: Literal["line", "file"] = "line"
    """What a document is in a .txt file: every line that is not blank, or the whole file."""
    format: Literal["auto", "jsonl", "txt", "parquet"] = "auto"
    """auto tells the format by the file's name."""
    workers: int | None = None
    """Processes that tokenize; by default one a core."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a malformed row: stop and name it, or leave it out and count it."""
    overwrite: bool = False
    """Replace a corpus of this name."""
    restart: bool = False
    """Throw away what a killed build left, and begin again."""
    save_every: float = 30.0
    """Seconds between the points from which a killed build can go on."""


def main(arguments: list[str]) -> None:
    """Build a corpus."""
    flags = tyro.cli(tyro.conf.OmitArgPrefixes[Build], args=arguments, prog="mtl data build")
    one_thread_a_process()
    tokenizer = flags.tokenizer.load()
    if tokenizer is None:
        raise UserError(f"--tokenizer is not given: choose {', '.join(KINDS)}.")
    job = Job(
        flags.input, flags.output, flags.key, flags.append_eod, flags.txt, flags.format,
        cores() if flags.workers is None else flags.workers, flags.on_error, flags.overwrite, flags.restart, flags.save_every,
    )  # fmt: skip
    began = time.perf_counter()
    with BytesBar(flags.output.name) as bar:
        done = build(job, tokenizer, lambda at: bar.move(at.done, at.total, at.text_bytes - at.resumed_text, at.resumed_at))
    _tell(job, done, time.perf_counter() - began)


def _tell(job: Job, done: Progress, seconds: float) -> None:
    console = Console(highlight=False)
    if done.resumed_at:
        console.print(f"went on from {done.resumed_text / 1e6:,.1f} MB of text that an earlier build had done")
    size = done.text_bytes - done.resumed_text
    w = done.written
    console.print(
        f"{job.output}.bin and .idx: {w.documents:,} documents, {w.sequences:,} sequences, {w.tokens:,} tokens; "
        f"{size / 1e6:,.1f} MB in {seconds:,.1f} s, {size / 1e6 / seconds:,.1f} MB/s with {job.workers} worker{'s' * (job.workers > 1)}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    if done.skipped:
        print(f"skipped {done.skipped:,} malformed rows, left out of the counts above; the first:", file=sys.stderr)
        print("\n".join(f"  {text}" for text in done.examples), file=sys.stderr)
