"""Measure a machine and write its device table: `torchrun --nproc-per-node 8 experiments/bench/calibrate.py --out mine.json`.

Peaks, sizes and what is not measured (the cluster's link, how much communication is hidden) are those of the base table.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

from mtl.errors import UserError
from mtl.inspect import hardware
from mtl.kernels.attention import attend
from mtl.kernels.masks import Mask
from mtl.runtime import process


@dataclass(frozen=True)
class Calibrate:
    """What to measure with."""

    base: str = "h200"
    """The table with the device's peaks."""
    out: Path = Path("device.json")
    size: int = 8192
    """Rows and columns of the products."""
    tokens: int = 4096
    """Length of the attention."""
    repeats: int = 20


def main() -> None:
    """Measure, and write the table."""
    settings = tyro.cli(Calibrate, args=process.command_line())
    values: dict[str, Any] = json.loads((hardware.FOLDER / f"{hardware.load(settings.base).name}.json").read_text())
    at = process.place()
    process.prepare_environment()
    with process.process_group(at):
        found = measure(settings, values, at)
        if at.rank:
            return
        values["efficiency"] |= found
        values["name"], values["match"] = settings.out.stem, []
        values["sources"] |= dict.fromkeys(found, f"measured: calibrate.py on {at.world} devices, {time.strftime('%Y-%m-%d')}")
        try:
            settings.out.write_text(json.dumps(values, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--out {settings.out} cannot be written: {error}.") from None
        print("\n".join(f"{name:20} {share}" for name, share in found.items()), f"table: {settings.out}", sep="\n")


def measure(settings: Calibrate, values: dict[str, Any], at: process.Place) -> dict[str, Any]:
    """Give the shares of the base's peaks that products, attention, memory and the node's link reach."""
    peak = values["peak_flops"]["bfloat16"]
    n = settings.size
    a, b = (torch.randn(n, n, device=at.device, dtype=torch.bfloat16) for _ in range(2))
    found: dict[str, Any] = {"matmul": share(2 * n**3 / seconds(lambda: a @ b, settings.repeats, at.device), peak)}
    moved = 2 * a.nbytes / seconds(lambda: a + 1.0, settings.repeats, at.device)
    found["memory"] = share(moved, values["memory_bandwidth"])
    found |= {"attention_forward": {}, "attention_backward": {}}
    for head in (64, 128):
        forward, both = attention(settings, head, at.device)
        work = 4 * 32 * head * settings.tokens * (settings.tokens + 1) // 2
        found["attention_forward"][str(head)] = share(work / forward, peak)
        found["attention_backward"][str(head)] = share(2.5 * work / max(both - forward, 1e-9), peak)
    if at.world > 1:
        part = torch.empty(2**27 // at.world, device=at.device, dtype=torch.bfloat16)
        whole = torch.empty(part.numel() * at.world, device=at.device, dtype=torch.bfloat16)
        gather: Any = dist.all_gather_into_tensor  # pyright: ignore[reportDeprecated]
        time_ = seconds(lambda: gather(whole, part), settings.repeats, at.device)
        found["node"] = share(whole.nbytes * (at.world - 1) / at.world / time_, values["links"]["node"]["bandwidth"])
    return found


def attention(settings: Calibrate, head: int, device: torch.device) -> tuple[float, float]:
    """Time one sample's causal attention with 32 query heads, forward, and forward with backward."""
    shape = (1, settings.tokens, 32, head)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return attend(q, k, v, Mask(), None, head**-0.5)

    both = seconds(lambda: torch.autograd.grad(forward().sum(), (q, k, v)), settings.repeats, device)
    with torch.no_grad():
        return seconds(forward, settings.repeats, device), both


def seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Time one run: the mean of several, after two that warm up."""
    for _ in range(2):
        run()
    _settle(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _settle(device)
    return (time.perf_counter() - start) / repeats


def share(reached: float, peak: float) -> float:
    """Give a share of a peak, at most 1."""
    return float(f"{min(1.0, reached / peak):.3g}")


def _settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    process.guarded(main)
