"""Time whole training steps of a preset on random tokens: `torchrun --nproc-per-node N experiments/bench/step.py --preset llama3_8b`.

Prints one line a run and, with --json FILE, appends one JSON object.
"""

import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from experiments import pretrain
from experiments.presets import PRESETS
from experiments.provenance import provenance
from experiments.settings import MeshSettings
from mtl import params
from mtl.data.batches import BatchShape, batch_at
from mtl.errors import unknown
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.runtime import process
from mtl.sharding.mesh import make_mesh
from mtl.sharding.parallel import Parallel
from mtl.train.speed import flops_per_token, peak_flops, peak_memory_gib
from mtl.train.state import init_state
from mtl.train.step import make_step


@dataclass(frozen=True)
class Bench:
    """What to time."""

    preset: str = "llama3_8b"
    rules: str | None = None
    mesh: MeshSettings = field(default_factory=MeshSettings)
    seq_len: int = 8192
    micro_batch_size: int = 2
    accumulate: int = 1
    layers: int | None = None
    """Fewer layers than the preset has."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: Literal["none", "block", "step"] = "step"
    remat: str = "none"
    reduce: Literal["float32", "bfloat16"] = "float32"
    """The type in which gradients are summed over devices."""
    optimizer: Literal["plain", "fused"] = "plain"
    attention: str = "auto"
    steps: int = 13
    warmup: int = 3
    lr: float = 3e-4
    seed: int = 0
    fixed: bool = True
    """Draw all steps from one small set of samples, so that the loss can fall."""
    json: Path | None = None


class RandomTokens:
    """Samples of uniform random tokens, the same for the same index."""

    def __init__(self, vocab: int, seed: int, period: int) -> None:
        """Take what decides them."""
        self.vocab, self.seed, self.period = vocab, seed, period

    def __call__(self, index: int, length: int) -> Any:
        """Give one sample."""
        generator = torch.Generator().manual_seed(self.seed * 1000003 + index % self.period)
        return torch.randint(0, self.vocab, (length,), generator=generator).numpy()


def main() -> None:
    """Time one configuration."""
    bench = tyro.cli(Bench, args=process.command_line(), config=(tyro.conf.AvoidSubcommands,))
    if bench.preset not in PRESETS:
        raise unknown("preset", bench.preset, PRESETS)
    at = process.place()
    process.prepare_environment()
    preset = PRESETS[bench.preset]
    model = dataclasses.replace(preset.model, layers=bench.layers or preset.model.layers, attention_impl=bench.attention)
    setup = dataclasses.replace(preset, model=model, mesh=bench.mesh, rules=bench.rules, precision=bench.precision, remat=bench.remat)
    rules, shape = pretrain.choose_layout(setup, at.world)
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    total = rows * bench.micro_batch_size * bench.accumulate
    settings = dataclasses.replace(
        preset.train, global_batch_size=total, micro_batch_size=bench.micro_batch_size, seq_len=bench.seq_len, seed=bench.seed
    )
    setup = dataclasses.replace(setup, train=settings, compile=bench.compile)
    precision = dataclasses.replace(pretrain.choose_precision(setup, at.device), reduce=getattr(torch, bench.reduce))
    pretrain.check(setup, rules, shape, precision, at.device)
    with process.process_group(at):
        mesh = make_mesh(shape, at.device.type)
        par = Parallel(mesh, rules, pretrain.sizes(setup, rules, shape), precision.reduce)
        specs = decoder.specs(model)
        optimizer = adamw(params.decayed(specs), impl=bench.optimizer)
        rate = schedule("constant", bench.lr, 1000, 5)
        step = make_step(decoder, model, par, optimizer, rate, pretrain.make_step_options(setup, precision, at.device))
        state = init_state(specs, rules, mesh, bench.seed, precision, optimizer)
        samples = RandomTokens(model.vocab, bench.seed, 4 * total if bench.fixed else 1 << 40)
        batches = BatchShape(total, bench.micro_batch_size, bench.seq_len)
        times: list[float] = []
        losses: list[float] = []
        ready = [batch_at(par, samples, i * total, batches, precision.param) for i in range(4)]
        for i in range(bench.steps):
            start = time.perf_counter()
            state, metrics = step(state, ready[i % 4])
            losses.append(metrics["loss"].item())
            times.append(time.perf_counter() - start)
        report(bench, setup, rules.name, str(shape), at, times, losses, specs, total)


def report(bench: Bench, setup: Any, rules: str, mesh: str, at: Any, times: list[float], losses: list[float], specs: Any, total: int) -> None:
    """Print the line and write the object."""
    seconds = statistics.median(times[bench.warmup :])
    speed = total * bench.seq_len / seconds / at.world
    peak = peak_flops(at.device)
    found: dict[str, Any] = {
        "preset": bench.preset, "layers": setup.model.layers, "rules": rules, "mesh": mesh, "devices": at.world, "seq_len": bench.seq_len,
        "micro_batch": bench.micro_batch_size, "precision": bench.precision, "reduce": bench.reduce, "compile": bench.compile,
        "remat": bench.remat, "attention": bench.attention, "tokens_per_second_per_device": round(speed, 1), "step_ms": round(seconds * 1e3, 1),
        "step_ms_min_max": [round(f(times[bench.warmup :]) * 1e3, 1) for f in (min, max)], "first_step_s": round(times[0], 1),
        "mfu": None if peak is None else round(speed * flops_per_token(specs, setup.model, bench.seq_len) / peak, 4),
        "mfu_full_attention": None if peak is None else round(speed * flops_per_token(specs, setup.model, bench.seq_len, False) / peak, 4),
        "peak_memory_gib": round(peak_memory_gib(at.device), 2), "losses": losses, "date": time.strftime("%Y-%m-%d"), **provenance(),
    }  # fmt: skip
    if at.rank == 0:
        share = "" if peak is None else f"  causal MFU {found['mfu']:.1%}"
        print(
            f"{bench.preset} {rules} {mesh} seq {bench.seq_len} x {bench.micro_batch_size} {bench.precision} compile {bench.compile} remat "
            f"{bench.remat}: first step {times[0]:.0f} s  step {seconds * 1e3:.0f} ms  {speed:,.0f} tokens/s/device{share}  "
            f"peak {found['peak_memory_gib']} GiB  loss {losses[0]:.4f} -> {losses[-1]:.4f}",
            flush=True,
        )
        if bench.json:
            with bench.json.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    process.guarded(main)
