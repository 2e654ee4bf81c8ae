"""How fast `mtl data build` tokenizes on one core, against the tokenizer libraries alone: `python experiments/bench/tokenizing.py`.

The texts are Python's own library and manual. A vocabulary of GPT-2's size is trained on every other file; the rest is measured.
Every contestant gets the same texts in the same run, in turn, on one thread; the median of the rounds counts. The build's time holds
everything from the first byte of the .jsonl to the last of the .idx: reading, JSON, tokenizing, writing.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from mtl.data import tokenizers
from mtl.data.build import Job, build
from mtl.data.extra import need
from mtl.data.python_text import END, python_text
from mtl.data.tokenizers.byte_level import BYTE_OF, as_bytes
from mtl.data.tokenizers.gpt2 import PATTERN
from mtl.runtime import process
from mtl.runtime.workers import one_thread_a_process


@dataclass(frozen=True)
class Bench:
    """Measure tokenizing on one core."""

    rounds: int = 5
    vocab_size: int = 50257
    vocab: Path | None = None
    """Another vocabulary (with merges) than the one trained here."""
    merges: Path | None = None
    characters: int = 4000
    """Length of a document; longer files are cut."""


def main() -> None:
    """Run all contestants in turn and print a table."""
    flags = tyro.cli(Bench, args=process.command_line())
    one_thread_a_process()
    files = [document.decode("utf-8", "replace") for part in python_text() for document in part.tobytes().split(END)]
    texts = [text[i : i + flags.characters] for text in files[1::2] for i in range(0, len(text), flags.characters)]
    size = sum(len(t.encode()) for t in texts) / 1e6
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        vocab, merges = (flags.vocab, flags.merges) if flags.vocab and flags.merges else train(folder, files[::2], flags.vocab_size)
        contestants = make(folder, texts, vocab, merges)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for i in range(flags.rounds + 1):
            for name, run in contestants.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if i:  # the first round warms caches
                    times[name].append(cpu)
                print(f"round {i}: {name}: {size / wall:.1f} MB/s by the clock, {size / cpu:.1f} by processor time", file=sys.stderr)
    speeds = {name: size / statistics.median(t) for name, t in times.items()}
    best = max(speed for name, speed in speeds.items() if not name.startswith("mtl"))
    print(f"{len(texts):,} documents, {size:.1f} MB of text, one core, median of {flags.rounds} rounds by processor time")
    for name, speed in speeds.items():
        print(f"{name:45} {speed:6.1f} MB/s  {speed / best:5.2f} of the fastest library")


def train(folder: Path, texts: list[str], size: int) -> tuple[Path, Path]:
    """Train a vocabulary of GPT-2's kind."""
    library = need("tokenizers", "this benchmark")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    inner.model.save(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


def make(folder: Path, texts: list[str], vocab: Path, merges: Path) -> dict[str, Callable[[], Any]]:
    """Make the contestants; each checks nothing and keeps everything, as a build would."""
    library, tiktoken = need("tokenizers", "this benchmark"), need("tiktoken", "this benchmark")
    hugging = library.Tokenizer(library.models.BPE.from_file(str(vocab), str(merges)))
    hugging.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs = [line.split(" ") for line in merges.read_text().split("\n") if line and not line.startswith("#version")]
    ranks = {as_bytes(name) or b"": rank for rank, name in enumerate([*BYTE_OF, *("".join(p) for p in pairs)])}
    openai = tiktoken.Encoding("bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    mine = tokenizers.load("gpt2", vocab=vocab, merges=merges)
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    job = Job((source,), folder / "out", append_eod=True, overwrite=True)
    return {
        "tokenizers: encode_batch_fast": lambda: [e.ids for e in hugging.encode_batch_fast(texts)],
        "tiktoken: encode_ordinary": lambda: [openai.encode_ordinary(t) for t in texts],
        "tiktoken: encode_to_numpy": lambda: [np.asarray(openai.encode_to_numpy(t, disallowed_special=())) for t in texts],
        "mtl: encode_flat": lambda: mine.encode_flat(texts),
        "mtl: data build, .jsonl to .bin and .idx": lambda: build(job, mine),
    }


if __name__ == "__main__":
    process.guarded(main)
