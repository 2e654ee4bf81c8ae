"""Time packing and attention within documents: `python experiments/bench/packing.py`, on the CPU."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mtl.data.packing import best_fit, deal
from mtl.kernels.attention import KERNELS
from mtl.kernels.masks import Documents, Mask


def main() -> None:
    """Print one line a case."""
    for capacity, mu, sigma in ((2048, 5.5, 1.0), (4096, 6.0, 1.2), (8192, 6.5, 1.3), (131072, 7.0, 1.5)):
        lengths = np.clip(np.random.default_rng(0).lognormal(mu, sigma, 1_000_000).astype(np.int64), 1, capacity)
        packing, seconds = timed(best_fit, lengths, capacity)
        _, more = timed(deal, lengths, packing.ranks, 1)
        print(
            f"best fit of 1,000,000 lengths into {capacity}: {packing.efficiency:.4%} full, {seconds:.2f} s; an epoch's deal {more:.2f} s"
        )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4096, heads, 64) for heads in (8, 2, 2))
    for count in (1, 8, 64):
        ends = torch.arange(1, count + 1, dtype=torch.int32).unsqueeze(0) * (4096 // count)
        documents, mask = Documents(ends, ends), Mask()
        for name in ("cpu", "plain"):
            kernel = KERNELS[name]

            def both(kernel: Any = kernel, mask: Mask = mask, documents: Documents = documents) -> None:
                out, lse = kernel.forward(q, k, v, mask, documents, 0.125)
                kernel.backward(q, q, k, v, out, lse, mask, documents, 0.125)

            both()
            print(f"attention, 4096 tokens in {count} documents, {name}: {min(timed(both)[1] for _ in range(3)) * 1e3:.0f} ms both ways")


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Run a function; give its result and the seconds."""
    start = time.perf_counter()
    return fn(*args), time.perf_counter() - start


if __name__ == "__main__":
    main()
