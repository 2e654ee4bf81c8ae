"""How long a training step waits for its data: `python experiments/bench/feed.py`, as many processes as a node has devices.

Every process feeds itself as a run does (threads make batches ahead of the step that takes them) from a blend of two corpora, and a sleep
stands for the device's work, during which a training process waits in one call too. Then the same without the sleep: what the feeds can
give.
"""

import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.bench.data import synthetic
from mtl.axes import MESH_AXES
from mtl.data.batches import BatchShape, host_batch
from mtl.data.dataset import DataSettings, open_dataset
from mtl.data.feed import Feed
from mtl.sharding.mesh import Mesh, MeshShape
from mtl.sharding.parallel import Parallel
from sharding_rules import load


@dataclass(frozen=True)
class Bench:
    """What a node does."""

    processes: int = 8
    """Devices of the node: each has a process that makes its own batches."""
    data_ranks: int = 8
    """Of these, how many have samples of their own; with fewer, several processes make the same ones (tensor parallelism)."""
    tokens_per_second: float = 1e6
    """Of the node."""
    seq_len: int = 4096
    step_seconds: float = 0.25
    steps: int = 40
    workers: int = 2
    prefetch: int = 4
    documents: int = 1_000_000
    """Documents of the corpus, of 500 tokens on average."""
    apart: bool = False
    """Keep documents apart: ends of documents and positions are made too."""


def main() -> None:
    """Print the share of the time that the slowest process waited, and the most that the node's feeds give together."""
    bench = tyro.cli(Bench)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        synthetic(prefix, bench.documents)
        together, answers = context.Barrier(bench.processes), context.Queue()
        workers = [context.Process(target=process, args=(bench, str(prefix), n, together, answers)) for n in range(bench.processes)]
        for worker in workers:
            worker.start()
        found = [answers.get() for _ in workers]
        for worker in workers:
            worker.join()
    tokens = batch_size(bench) * bench.seq_len
    waited, fastest = max(w for w, _ in found), tokens * bench.steps / max(s for _, s in found)
    print(
        f"{bench.processes} processes, {bench.data_ranks} data ranks, {bench.workers} threads each, {tokens:,} tokens a step, "
        f"{tokens / bench.step_seconds / 1e6:.2f} M tokens/s: waited {waited:.3%} of the time; "
        f"without a pause {fastest / 1e6:.1f} M tokens/s"
    )


def batch_size(bench: Bench) -> int:
    """Give the samples of a step, a multiple of the data ranks."""
    return max(1, round(bench.tokens_per_second * bench.step_seconds / bench.seq_len / bench.data_ranks)) * bench.data_ranks


def process(bench: Bench, prefix: str, number: int, together: Any, answers: Any) -> None:
    """Be one of the node's processes."""
    torch.set_num_threads(1)
    settings = DataSettings((f"0.3 {prefix} 0.7 {prefix}",), apart=bench.apart, reset_positions=bench.apart, mask_ends=bench.apart)
    dataset = open_dataset(settings, "train", 0, bench.seq_len, 0, 50257)
    assert dataset is not None
    place = {**dict.fromkeys(MESH_AXES, 0), "fsdp": number % bench.data_ranks}
    nowhere: Any = None
    par = Parallel(
        Mesh(MeshShape(fsdp=bench.data_ranks), nowhere, place, {}), load("fsdp"), {"batch": bench.data_ranks, "seq": bench.seq_len}
    )
    size = batch_size(bench)

    def make(i: int) -> dict[str, torch.Tensor]:
        return host_batch(par, dataset.samples, i * size, BatchShape(size, 1, bench.seq_len), torch.float32)

    def run(first: int, pause: float) -> tuple[float, float]:
        feed = Feed(make, range(first, first + bench.steps + 1), torch.device("cpu"), bench.workers, bench.prefetch)
        feed(first)
        together.wait()
        start, waited = time.perf_counter(), 0.0
        for i in range(first + 1, first + bench.steps + 1):
            time.sleep(pause)
            feed(i)
            waited += feed.waited
        took = time.perf_counter() - start
        feed.close()
        return waited / took, took

    waited, _ = run(0, bench.step_seconds)
    _, took = run(1000, 0.0)
    answers.put((waited, took))


if __name__ == "__main__":
    main()
