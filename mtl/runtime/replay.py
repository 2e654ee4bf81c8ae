"""A step that a GPU replays: launched kernel by kernel once, then recorded, then one launch a step."""

from collections.abc import Callable

import torch
from torch import Tensor


def replayed(step: Callable[[], Tensor], device_type: str) -> Callable[[], Tensor]:
    """Record a step that reads and writes the same tensors at every call; its result is one tensor, overwritten by the next call.

    A token of an 8B model takes an H200 some 4 ms, in about 500 kernels: launched one by one they would take longer than they run. The
    first call runs as it is (compilers and libraries settle), the second is recorded and replayed, the others are replays. Devices that
    cannot record run every call as it is.
    """
    if device_type != "cuda":
        return step
    found: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
    calls = 0

    def call() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            return _aside(step)
        if not found:
            found.append(_record(step))
        graph, out = found[0]
        graph.replay()
        return out

    return call


def _aside(step: Callable[[], Tensor]) -> Tensor:
    """Run a step on a stream of its own, as a recording will: what libraries set up for the usual stream must not be recorded."""
    usual, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(usual)
    with torch.cuda.stream(side):
        out = step()
    usual.wait_stream(side)
    out.record_stream(usual)
    return out


def _record(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record a step without running it. Other threads (NCCL's watchdog) may ask the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step()
    return graph, out
