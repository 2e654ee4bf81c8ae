"""Say what a training step will cost before it runs: `mtl plan --preset llama3_8b --mesh fsdp=8 --device h200`. No devices are needed."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import plan_search, planning, pretrain, resting
from experiments.presets import PRESETS
from experiments.settings import Experiment, OptimSettings, PipelineSettings, TrainSettings
from mtl.cli.preset_flags import place, take_preset
from mtl.errors import UserError
from mtl.inspect import hardware
from mtl.inspect.describe import as_page, as_text
from mtl.inspect.page import write_page
from mtl.models import decoder
from mtl.precision import PRECISIONS
from mtl.train.step import StepOptions


@dataclass(frozen=True)
class PlanSettings:
    """What to plan. The flags of model, train and optim are those of experiments/pretrain.py."""

    model: decoder.Config
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    """Devices along each axis, such as fsdp=64,tensor=8; nothing is one device."""
    rules: str | None = None
    """A shipped table's name, a path to a table, or a module; by default chosen from the mesh."""
    device: str = "h200"
    """A device table's name, or a JSON file of one (experiments/bench/calibrate.py writes it)."""
    node_size: int | None = None
    """Devices that the fast link joins, where it is not the table's number."""
    precision: Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp8_rows"] = "bf16"
    compile: Literal["none", "block", "step"] = "step"
    transport: Literal["auto", "nccl", "engine"] = "auto"
    """How weights and gradients travel, as in experiments/pretrain.py: auto is copy engines in one node of NVLink, in compiled steps."""
    packed: bool = False
    """Rows hold several documents that attention keeps apart, as experiments/finetune.py packs them."""
    remat: str = "none"
    """What is computed again in backward: none, gather, selective, mlp, mlp:N, dense, full, or every:N."""
    offload: Literal["none", "activations", "optimizer", "both"] = "none"
    """What is kept in host memory, as in experiments/pretrain.py."""
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    """Schedule, micro-batches and stages where the mesh has pipe."""
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a page with bars of memory and time."""
    json: bool = False
    """Print one JSON object instead of text."""
    search: bool = False
    """Look for the best meshes, rules, remat and micro-batch instead, for --devices."""
    devices: int = 8
    """How many devices a search may use."""
    memory: str | None = None
    """How much memory of a device a search may use, such as 80GiB; by default all of it."""
    global_batch_tokens: str | None = None
    """Tokens a step of a search, such as 4M (4 x 2**20); by default those of the preset's batch."""
    show: int = 3
    """How many proposals a search shows."""


def main(arguments: list[str]) -> None:
    """Plan one step, or search."""
    name, preset, rest = take_preset(arguments)
    start = PlanSettings(preset.model, train=preset.train, optim=preset.optim)
    settings = tyro.cli(
        PlanSettings, args=rest, default=start, prog=f"mtl plan --preset {name}",
        description=f"{__doc__} Presets: {', '.join(PRESETS)}. Devices: {', '.join(hardware.names())}.",
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip
    device = hardware.load(settings.device)
    if settings.node_size is not None:
        if settings.node_size < 1:
            raise UserError(f"--node-size is {settings.node_size}: a node has at least 1 device.")
        device = dataclasses.replace(device, node_size=settings.node_size)
    setup = dataclasses.replace(
        preset, model=settings.model, train=settings.train, optim=settings.optim, precision=settings.precision, remat=settings.remat,
        compile=settings.compile, transport=settings.transport, pipeline=settings.pipeline, offload=settings.offload,
    )  # fmt: skip
    if settings.search:
        search(name, setup, settings, device)
    else:
        one(name, setup, settings, device)


def one(name: str, setup: Experiment, settings: PlanSettings, device: hardware.Device) -> None:
    """Plan one mesh."""
    setup, rules, shape = place(setup, settings.mesh, settings.rules)
    setup = pretrain.with_micro_batch(setup, rules, shape)
    sizes = pretrain.sizes(setup, rules, shape)
    planning.check_sizes(setup, rules, shape, sizes)
    resting.check(setup, shape)
    options = StepOptions(
        PRECISIONS[settings.precision], settings.remat, settings.compile, clip=settings.optim.clip, offload=settings.offload
    )
    engine = planning.by_engine(setup, shape, device)
    found = planning.plan(setup, planning.job_for(setup, rules, shape, sizes, options, "meta", settings.packed, engine), device)
    train = setup.train
    ways = [f"remat {settings.remat}"]
    ways += [f"offload {settings.offload}"] * (settings.offload != "none") + ["copy engines"] * engine
    about = (
        f"mesh {shape} ({shape.devices():,} {device.name}), rules {rules.name}, {settings.precision}, compile {settings.compile}, "
        f"{', '.join(ways)}; {train.global_batch_size} x {train.seq_len} tokens a step, {train.micro_batch_size} at once a device"
    )
    if settings.html is not None:
        write_page(settings.html, as_page(found, f"Plan of {name}", about))
    if settings.json:
        chosen = {"preset": name, "mesh": shape.sizes(), "rules": rules.name, "device": device.name, "remat": settings.remat}
        chosen |= {
            "transport": "engine" if engine else "collectives",
            "compile": settings.compile,
            "precision": settings.precision,
            "offload": settings.offload,
            "train": dataclasses.asdict(train),
        }
        print(json.dumps({**chosen, **found.as_json()}))
        return
    print(as_text(found, f"{name}: {about}"))
    if settings.html is not None:
        print(f"\npage: {settings.html}")


def search(name: str, setup: Experiment, settings: PlanSettings, device: hardware.Device) -> None:
    """Propose the best few."""
    budget = device.memory_bytes if settings.memory is None else plan_search.parse_bytes(settings.memory)
    tokens = settings.train.global_batch_size * settings.train.seq_len
    if settings.global_batch_tokens is not None:
        tokens = plan_search.parse_count(settings.global_batch_tokens, "--global-batch-tokens")
    if settings.devices < 1 or settings.show < 1:
        raise UserError(f"--devices is {settings.devices} and --show {settings.show}: both must be at least 1.")
    found = plan_search.search(setup, settings.devices, budget, tokens, device)
    if settings.json:
        print(json.dumps({"preset": name, "device": device.name, "budget": budget, **plan_search.as_json(found, settings.show)}))
        return
    print(f"{name} on {settings.devices} x {device.name}, {budget / 2**30:.1f} GiB each, {tokens:,} tokens a step")
    print(plan_search.as_text(found, settings.show))
