"""Time the data path: samples a second of one thread, and start-up on an index of many documents: `python experiments/bench/data.py`."""

import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from mtl.data.dataset import DataSettings, open_dataset
from mtl.data.indexed import HEADER, MAGIC, VERSION


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    documents: int = 1_000_000
    """Documents of the synthetic index; 12 bytes of disk each. Its .bin is a hole in the disk."""
    empty: int = 0
    """Of these, so many at the beginning have no tokens: their part of the index is a hole in the disk too."""
    samples: int = 2000
    seq_len: int = 4096
    folder: Path | None = None
    """Where the corpus is written; by default a temporary folder."""


def synthetic(prefix: Path, documents: int, empty: int = 0, block: int = 1 << 22) -> None:
    """Write an index of documents of 1 to 1000 tokens, all sequences of one document, and a .bin of the right length that holds zeros.

    An order's documents are the file's sequences, as in Megatron-LM. The first ``empty`` of them have no tokens.
    """
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, 2))
        starts = range(empty, documents, block)
        file.seek(4 * empty, 1)
        for i in starts:
            file.write(lengths(i, min(block, documents - i)).tobytes())
        file.seek(8 * empty, 1)
        place = 0
        for i in starts:
            sizes = 2 * lengths(i, min(block, documents - i)).astype(np.int64)
            ends = place + sizes.cumsum()
            file.write((ends - sizes).tobytes())
            place = int(ends[-1])
        file.write(np.array([0, documents], dtype=np.int64).tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(place)


def lengths(first: int, count: int) -> np.ndarray:
    """Give the lengths of some documents: 1 to 1000, scattered."""
    return (np.arange(first, first + count, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(1000) + np.uint64(1)).astype(np.int32)


def memory() -> float:
    """Give the most memory that this process had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the numbers."""
    bench = tyro.cli(Bench)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        prefix = Path(folder) / "corpus"
        writer = multiprocessing.get_context("fork").Process(target=synthetic, args=(prefix, bench.documents, bench.empty))
        writer.start()  # apart, so that writing does not count as this process's memory
        writer.join()
        before, start = memory(), time.perf_counter()
        dataset = open_dataset(DataSettings((f"0.3 {prefix} 0.7 {prefix}",), split="1"), "train", 0, bench.seq_len, 0, 50257)
        assert dataset is not None
        for i in range(8):
            dataset.samples(i, bench.seq_len)
        print(f"{bench.documents:,} documents: first 8 samples after {time.perf_counter() - start:.3f} s, {memory() - before:.0f} MB more")
        start = time.perf_counter()
        for i in range(8, 8 + bench.samples):
            dataset.samples(i, bench.seq_len)
        each = (time.perf_counter() - start) / bench.samples
        print(
            f"{1 / each:,.0f} samples/s of {bench.seq_len} tokens in one thread: {bench.seq_len / each / 1e6:.1f} M tokens/s, "
            f"{each * 1e6:.0f} us each"
        )


if __name__ == "__main__":
    main()
