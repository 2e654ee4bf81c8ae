"""Measure a machine and write its device table: `torchrun --nproc-per-node 8 experiments/bench/calibrate.py --out mine.json`.

Products, attention and memory run for a while each, since a chip that is hot takes longer than a cold one. Peaks, sizes and what is not
measured (the cluster's link, how much communication is hidden) are those of the base table.
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
from mtl.kernels import fp8
from mtl.kernels.attention import attend
from mtl.kernels.masks import Mask
from mtl.runtime import process

REPEATS = 8


@dataclass(frozen=True)
class Calibrate:
    """What to measure with."""

    base: str = "h200"
    """The table with the device's peaks."""
    out: Path = Path("device.json")
    """Where the table goes; plans take it as `--device FILE`."""
    tokens: int = 8192
    """Rows of the products, and length of the attention."""
    width: int = 4096
    """The products take rows from so many columns to 3.5 times as many, as an MLP does."""
    megabytes: int = 1024
    """Size of the arrays that memory and links move."""
    seconds: float = 1.0
    """How long each is repeated."""


def main() -> None:
    """Measure, and write the table."""
    settings = tyro.cli(Calibrate, args=process.command_line())
    base = hardware.load(settings.base)
    values: dict[str, Any] = json.loads((hardware.FOLDER / f"{base.name}.json").read_text())
    at = process.place()
    process.prepare_environment()
    with process.process_group(at):
        found = measure(settings, base, at)
        if at.world > 1:
            links, latency = measure_links(settings, base, at)
            found |= links
            values["links"]["node"]["latency"] = latency
        launch = found.pop("launch")
        if at.rank:
            return
        values["launch"] = launch
        values["efficiency"] |= found
        values["name"], values["match"] = settings.out.stem, []
        said = f"measured: calibrate.py on {at.world} devices, {time.strftime('%Y-%m-%d')}"
        values["sources"] |= dict.fromkeys([*found, "launch", *(["latency"] if at.world > 1 else [])], said)
        try:
            settings.out.write_text(json.dumps(values, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--out {settings.out} cannot be written: {error}.") from None
        print("\n".join(f"{name:20} {share}" for name, share in (found | {"launch": launch}).items()), f"table: {settings.out}", sep="\n")


def measure(settings: Calibrate, base: hardware.Device, at: process.Place) -> dict[str, Any]:
    """Give the shares of the base's peaks that products, attention and memory reach, and the seconds that a small kernel takes."""
    rows, inner, wide = settings.tokens, settings.width, settings.width * 7 // 2
    here, peak = at.device, base.peak("bfloat16")
    a, b = _noise(here, rows, inner), _noise(here, inner, wide)
    work = 2 * rows * inner * wide
    found: dict[str, Any] = {"matmul": share(work / _seconds(lambda: a @ b, settings, here), peak)}
    if "float8_e4m3fn" in base.peak_flops and here.type == "cuda":
        a8, b8, one = a.to(fp8.VALUES), b.t().contiguous().to(fp8.VALUES).t(), torch.ones((), device=here)
        took = _seconds(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=a.dtype, use_fast_accum=True), settings, here)  # pyright: ignore
        found["matmul_fp8"] = share(work / took, base.peak_flops["float8_e4m3fn"])
    large = _noise(here, settings.megabytes << 19)
    found["memory"] = share(2 * large.nbytes / _seconds(lambda: torch.neg(large), settings, here), base.memory_bandwidth)
    found |= {"attention_forward": {}, "attention_backward": {}}
    for head in (64, 128):
        forward, both = _attention(settings, head, here)
        work = 4 * 32 * head * settings.tokens * (settings.tokens + 1) // 2
        found["attention_forward"][str(head)] = share(work / forward, peak)
        found["attention_backward"][str(head)] = share(2.5 * work / max(both - forward, 1e-9), peak)
    small = _noise(here, 64)
    return found | {"launch": float(f"{_seconds(small.neg_, settings, here):.3g}")}


def measure_links(settings: Calibrate, base: hardware.Device, at: process.Place) -> tuple[dict[str, float], float]:
    """Give the shares of the node's link that a gather reaches alone and beside products, and the seconds that the smallest takes."""
    part = _noise(at.device, (settings.megabytes << 19) // at.world)
    whole, tiny, few = part.new_empty(part.numel() * at.world), part[:8], part.new_empty(8 * at.world)
    gather: Any = dist.all_gather_into_tensor  # pyright: ignore[reportDeprecated]
    sent, peak = whole.nbytes * (at.world - 1) / at.world, base.links["node"].bandwidth
    alone, latency = (_mean(lambda o=o, i=i: gather(o, i), REPEATS, at.device) for o, i in ((whole, part), (few, tiny)))
    a, b = _noise(at.device, settings.tokens, settings.width), _noise(at.device, settings.width, settings.width)
    products = 1 + round(64 * alone / _mean(lambda: a @ b, REPEATS, at.device))  # go on until 8 slow gathers have ended
    beside = _beside(lambda: gather(whole, part), lambda: [a @ b for _ in range(products)], at.device) or alone
    found = {"node": share(sent / alone, peak), "node_beside": share(sent / max(alone, beside), peak)}
    return found, float(f"{latency:.3g}")


def _beside(move: Callable[[], Any], compute: Callable[[], Any], device: torch.device) -> float | None:
    """Time one move while the device computes on another stream; None where there are no streams."""
    if device.type == "cpu":
        return None
    streams: Any = torch.get_device_module(device)
    begin, end = (streams.Event(enable_timing=True) for _ in range(2))
    compute()
    with streams.stream(streams.Stream()):
        begin.record()
        for _ in range(REPEATS):
            move()
        end.record()
    _settle(device)
    return begin.elapsed_time(end) / 1e3 / REPEATS


def _attention(settings: Calibrate, head: int, device: torch.device) -> tuple[float, float]:
    """Time one sample's causal attention with 32 query heads, forward, and forward with backward."""
    shape = (1, settings.tokens, 32, head)
    q, k, v = (_noise(device, *shape).requires_grad_() for _ in range(3))
    grad = _noise(device, *shape)

    def forward() -> torch.Tensor:
        return attend(q, k, v, Mask(), None, head**-0.5)

    both = _seconds(lambda: torch.autograd.grad(forward(), (q, k, v), grad), settings, device)
    with torch.no_grad():
        return _seconds(forward, settings, device), both


def share(reached: float, peak: float) -> float:
    """Give a share of a peak, at most 1."""
    return float(f"{min(1.0, reached / peak):.3g}")


def _noise(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _seconds(run: Callable[[], Any], settings: Calibrate, device: torch.device) -> float:
    """Time one run over as many as take ``settings.seconds``, after half as many that warm up."""
    once = _mean(run, 3, device)
    repeats = 1 + round(settings.seconds / max(once, 1e-6))
    _mean(run, repeats // 2 + 1, device)
    return _mean(run, repeats, device)


def _mean(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    run()
    _settle(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _settle(device)
    return (time.perf_counter() - start) / repeats


def _settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    process.guarded(main)
