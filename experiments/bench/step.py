"""Time whole training steps of a preset: `torchrun --nproc-per-node N experiments/bench/step.py --preset llama3_8b`.

Prints one line a run and, with --json FILE, appends one JSON object.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from experiments import pretrain, remat_choice, resting
from experiments.bench.flags import check_counts, check_file
from experiments.presets import PRESETS
from experiments.provenance import provenance
from experiments.settings import Experiment, MeshSettings, TensorSettings
from mtl import params
from mtl.data.batches import BatchShape, batch_at
from mtl.data.python_text import python_text
from mtl.data.samples import Sample, Windows, as_sample
from mtl.errors import UserError, unknown
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.runtime import process
from mtl.runtime.profile import Profiler
from mtl.train.loop import Behind, Hook, fit
from mtl.train.speed import flops_per_token, peak_flops, peak_memory_gib, reserved_memory_gib
from mtl.train.state import init_state
from mtl.train.step import make_step


@dataclass(frozen=True)
class Bench:
    """Time whole training steps of a preset, on the built-in text unless --no-text is given."""

    preset: str = "llama3_8b"
    rules: str | None = None
    """Parallel layout: a shipped table's name, or a path to a table; by default chosen from the mesh."""
    mesh: MeshSettings = field(default_factory=MeshSettings)
    seq_len: int = 8192
    """Tokens a sample."""
    micro_batch_size: int = 2
    """Samples a device takes through the model at once."""
    accumulate: int = 1
    """Micro-batches a step."""
    layers: int | None = None
    """Layers of the model; by default the preset's."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp8_rows"] = "bf16"
    compile: Literal["none", "block", "step"] = "step"
    remat: str = "none"
    """What is computed again in backward: none, gather, selective, mlp, mlp:N, dense, full, every:N, or auto[:100GiB, :80%]."""
    offload: Literal["none", "activations", "optimizer", "both"] = "none"
    """What is kept in host memory."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """The type in which gradients are summed over devices."""
    overlap: bool = True
    """Start gathers ahead of use, where several GPUs talk."""
    transport: Literal["auto", "nccl", "engine"] = "auto"
    """What moves weights and gradients, as pretrain.py takes it."""
    products: Literal["auto", "torch", "quack"] = "auto"
    """Who multiplies large matrices, as pretrain.py takes it."""
    tensor: TensorSettings = field(default_factory=TensorSettings)
    optimizer: Literal["plain", "fused"] = "plain"
    """AdamW compiled from plain operations, or torch's fused kernel."""
    attention: str = "auto"
    """The kernel of attention, or auto."""
    steps: int = 13
    """Steps in all."""
    warmup: int = 3
    """The first so many steps are not counted."""
    lr: float = 3e-4
    lr_warmup: int = 200
    """Steps until the learning rate is reached."""
    seed: int = 0
    fixed: bool = True
    """Draw random tokens of all steps from one small set of samples, so that the loss can fall."""
    text: bool = True
    """Train on the built-in text, a token a byte; else on uniform random tokens, with which a chip does the same work at more power."""
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Record so many more steps at the end: a Chrome trace, and a page on where their time goes."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/bench")
    """Where the profile goes."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Append the numbers to a file, an object a line."""


class RandomTokens:
    """Samples of uniform random tokens, the same for the same index."""

    def __init__(self, vocab: int, seed: int, period: int) -> None:
        """Take what decides them."""
        self.vocab, self.seed, self.period = vocab, seed, period

    def __call__(self, index: int, seq_len: int) -> Sample:
        """Give one sample."""
        generator = torch.Generator().manual_seed(self.seed * 1000003 + index % self.period)
        return as_sample(torch.randint(0, self.vocab, (seq_len + 1,), generator=generator).numpy())


def main() -> None:
    """Time one configuration."""
    bench = tyro.cli(Bench, args=process.command_line(), config=(tyro.conf.AvoidSubcommands,))
    if not 0 <= bench.warmup < bench.steps:
        raise UserError(
            f"--warmup {bench.warmup} of --steps {bench.steps} leaves no step to time: take more steps than are for warming up."
        )
    check_counts(bench, 1, "seq_len", "micro_batch_size", "accumulate", "layers")
    check_counts(bench, 0, "profile", "seed", "lr_warmup")
    check_file(bench.json)
    if not 0 <= bench.lr < math.inf:
        raise UserError(f"--lr is {bench.lr}: it must be a number from 0 on.")
    at = process.place()
    process.prepare_environment(tf32=bench.precision == "tf32")
    behind = Behind(lambda i: at.device.type == "cuda" and i > 1)
    with prepared(bench, at, behind.settle) as (setup, chosen, run):
        times: list[float] = []
        losses: list[float] = []

        def seen(i: int, state: Any, record: dict[str, Any]) -> None:
            times.append(record["step_time"])
            losses.append(record["loss"])

        def take(steps: range, *hooks: Hook) -> None:
            step: Any = lambda state, i: (state, run(i))  # noqa: E731
            fit(None, step, lambda i: i, steps, hooks, behind)

        take(range(bench.steps), seen)
        report(bench, setup, chosen, at, times, losses)
        if bench.profile:
            about = f"{bench.preset} x{setup.model.layers}, {chosen}, {bench.precision} on {at.world} x {at.device.type}"
            profile(bench, about, at, lambda: take(range(bench.steps, bench.steps + bench.profile)))


@contextlib.contextmanager
def prepared(
    bench: Bench, at: process.Place, under_way: Callable[[], None] = lambda: None
) -> Generator[tuple[Experiment, str, Callable[[int], Any]]]:
    """Make ready what is timed: gives the settings, what was chosen in words, and ``run(i)``, which takes step i and gives its metrics."""
    if bench.preset not in PRESETS:
        raise unknown("preset", bench.preset, PRESETS)
    preset = PRESETS[bench.preset]
    model = dataclasses.replace(preset.model, layers=bench.layers or preset.model.layers, attention_impl=bench.attention)
    setup = dataclasses.replace(preset, model=model, mesh=bench.mesh, rules=bench.rules, remat=bench.remat, offload=bench.offload)
    setup = dataclasses.replace(setup, precision=bench.precision, transport=bench.transport, tensor=bench.tensor, products=bench.products)
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
        options = pretrain.make_step_options(setup, precision, at.device)
        known, engine = pretrain.sizes(setup, rules, shape), pretrain.by_engine(setup, shape, at)
        setup, said = remat_choice.settled(setup, rules, shape, known, options, at.device, lambda: False, engine)
        for line in said if at.rank == 0 else ():
            print(line, flush=True)
        par = pretrain.parallel(setup, rules, shape, precision, at)
        specs = decoder.specs(model)
        optimizer = adamw(params.decayed(specs), impl=bench.optimizer)
        rate = schedule("constant", bench.lr, 1000, bench.lr_warmup)
        options = pretrain.make_step_options(setup, precision, at.device)
        options = dataclasses.replace(options, overlap=bench.overlap, under_way=under_way)
        step = make_step(decoder, model, par, optimizer, rate, options)
        state = resting.Rest(bench.offload, specs, par.mesh, precision).fresh(partial(init_state, seed=bench.seed), rules, optimizer)
        samples = (
            Windows(python_text()[0], bench.seed, "train")
            if bench.text
            else RandomTokens(model.vocab, bench.seed, 4 * total if bench.fixed else 1 << 40)
        )
        batches = BatchShape(total, bench.micro_batch_size, bench.seq_len)
        ready = [batch_at(par, samples, i * total, batches, precision.param) for i in range(4 if not bench.text else bench.steps)]
        yield setup, f"{rules.name} {shape}{' in pieces' if par.piecewise else ''}", lambda i: step(state, ready[i % len(ready)])[1]


def profile(bench: Bench, about: str, at: process.Place, take: Callable[[], None]) -> None:
    """Take more steps under the profiler, on the first device."""
    profiler = Profiler(bench.out / "profile", at.device, about) if at.rank == 0 else None
    if profiler is not None:
        profiler.start()
    take()
    if profiler is not None:
        profiler.stop(bench.profile)
        print((profiler.folder / "summary.txt").read_text(), flush=True)


def report(bench: Bench, setup: Experiment, chosen: str, at: process.Place, times: list[float], losses: list[float]) -> None:
    """Print the line and write the object."""
    seconds = statistics.median(times[bench.warmup :])
    total = setup.train.global_batch_size * bench.seq_len
    speed = total / seconds / at.world
    peak, specs = peak_flops(at.device), decoder.specs(setup.model)
    engine = pretrain.by_engine(setup, pretrain.choose_layout(setup, at.world)[1], at)
    flops = [flops_per_token(specs, setup.model, bench.seq_len, causal) for causal in (True, False)]
    mfu = [None if peak is None else round(speed * f / peak, 4) for f in flops]
    spread = [round(f(times[bench.warmup :]) * 1e3, 1) for f in (min, max)]
    found: dict[str, Any] = {
        **dataclasses.asdict(bench),
        "chosen": chosen,
        "engine": engine,
        "devices": at.world,
        "layers": setup.model.layers,
    }
    found |= {"tokens_per_second_per_device": round(speed, 1), "step_ms": round(seconds * 1e3, 1), "step_ms_min_max": spread}
    found |= {"first_step_s": round(times[0], 1), "mfu": mfu[0], "mfu_full_attention": mfu[1], "losses": losses}
    found |= {
        "peak_memory_gib": round(peak_memory_gib(at.device), 2),
        "reserved_memory_gib": round(reserved_memory_gib(at.device), 2),
        "date": time.strftime("%Y-%m-%d"),
        **provenance(),
    }
    if at.rank == 0:
        share = "" if mfu[0] is None else f"  causal MFU {mfu[0]:.1%}"
        print(
            f"{bench.preset} x{setup.model.layers} {chosen} seq {bench.seq_len} x {bench.micro_batch_size} {bench.precision} "
            f"compile {bench.compile} remat {setup.remat} offload {bench.offload} {'engine' if engine else 'nccl'} reduce {bench.reduce}: "
            f"first step {times[0]:.0f} s  step {seconds * 1e3:.0f} ms  "
            f"{speed:,.0f} tokens/s/device{share}  peak {found['peak_memory_gib']} GiB  loss {losses[0]:.4f} -> {losses[-1]:.4f}",
            flush=True,
        )
        if bench.json:
            with bench.json.open("a") as file:
                file.write(json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    process.guarded(main)
