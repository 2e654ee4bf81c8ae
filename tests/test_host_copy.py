"""Host memory that a device copies from and to: taken whole, kept as it is, given back; the driver is played by a stand-in."""

import gc

import pytest
import torch

from mtl.checkpoint import background
from mtl.checkpoint.background import Saver
from mtl.kernels import host_copy

GPU = torch.device("cuda", 0)


class Driver:
    """Knows what memory is registered; says ``answer`` to whoever registers."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.held = answer, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.held[address] = size
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.held[address]
        return 0


def refuse(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "check_error", refuse)
    return found


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1025,), (70_001,), (0,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_pinned_memory_keeps_its_values_and_is_given_back(driver: Driver, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.arange(torch.Size(shape).numel()).view(shape) % 251).to(dtype)
    before = x.clone()
    assert host_copy.pin(x, GPU) is x
    assert torch.equal(x, before)
    assert driver.held == ({x.data_ptr(): x.nbytes} if x.numel() else {})
    del x
    gc.collect()
    assert not driver.held


def test_memory_that_cannot_be_pinned_is_told(driver: Driver) -> None:
    driver.answer = 2
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        host_copy.pin(torch.zeros(8), GPU)


def test_a_saver_registers_its_large_memory_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, asked = Saver(), list[bool]()
    size = background.REGISTERED
    for i in (0, 1, 0):
        saver._slab(i, size, GPU)
    assert sorted(driver.held.values()) == [size, size]
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: asked.append(pin_memory) or real(*a, **k))
    saver._slab(0, 2 * size, GPU)
    gc.collect()
    assert list(driver.held.values()) == [2 * size]
    Saver()._slab(0, 4096, GPU)  # may share its pages with what has nothing to do with it: torch's pool pins that
    assert list(driver.held.values()) == [2 * size]
    assert asked == [True]


def test_on_a_cpu_nothing_is_pinned(driver: Driver) -> None:
    host_copy.pin(torch.zeros(8), torch.device("cpu"))
    Saver()._slab(0, background.REGISTERED, torch.device("cpu"))
    assert not driver.held
