"""Saving beside training on a GPU: the state is written to as soon as the fence opens, and what was saved is the state before."""

from pathlib import Path

import pytest
import torch

from mtl import checkpoint, tree
from mtl.checkpoint.background import Saver

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def state_of(step: int) -> dict[str, torch.Tensor]:
    """A state that says its step everywhere; 1.1 GB in one large, some odd and many small leaves."""
    shapes = {"w": (16, 4096, 4096), "odd": (3, 1000, 777), "row": (4096,), "one": ()} | {f"n{i}": (513,) for i in range(40)}
    kinds = {"odd": torch.bfloat16, "one": torch.int64}
    return {n: torch.full(shape, step, dtype=kinds.get(n, torch.float32), device="cuda") for n, shape in shapes.items()}


@pytest.mark.parametrize("host_memory", [None, 192 << 20], ids=["at_once", "in_waves"])
def test_an_update_right_after_the_fence_does_not_reach_the_save(tmp_path: Path, host_memory: int | None) -> None:
    state, saver = state_of(0), Saver(host_memory)
    x = torch.randn(4096, 4096, device="cuda")
    saver.prepare(state).join()
    assert saver._slabs and all(slab.is_pinned() for slab in saver._slabs)
    for step in range(1, 4):
        for _ in range(50):
            x = (x @ x).clamp(-1, 1)  # the device is behind the process
        for leaf in state.values():
            leaf.add_(1)
        saver.save(tmp_path / str(step), state)
        for _ in range(50):
            x = (x @ x).clamp(-1, 1)  # the next gradient, beside the copies
        saver.fence()
        for leaf in state.values():
            leaf.add_(7)  # must not be seen in the save
        for leaf in state.values():
            leaf.sub_(7)
    saver.wait()
    for step in range(1, 4):
        found = checkpoint.restore(tmp_path / str(step), tree.map(lambda x: torch.empty_like(x, device="meta"), state))
        assert all(bool((leaf == step).all()) for leaf in found.values()), step
    on_device = checkpoint.restore(tmp_path / "3", state)
    assert all(x.is_cuda and bool((x == 3).all()) for x in on_device.values())


def test_a_wrong_order_would_be_seen(tmp_path: Path) -> None:
    """Without the fence the same update does reach the save, in time or not; the save itself stays whole."""
    state, saver = state_of(1), Saver(64 << 20)
    saver.save(tmp_path / "1", state)
    for leaf in state.values():
        leaf.add_(1)
    saver.wait()
    found = checkpoint.restore(tmp_path / "1", tree.map(lambda x: torch.empty_like(x, device="meta"), state))
    assert any(bool((leaf == 2).any()) for leaf in found.values())
