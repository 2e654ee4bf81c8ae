"""Pre-train a preset: `python experiments/pretrain.py PRESET --flags`, alone or under torchrun."""

if __name__ == "__main__":  # before the slow imports, so that no signal is lost while they run
    from mtl.runtime import signals

    CAUGHT = signals.install()

import dataclasses
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

import sharding_rules
from experiments import checkpoints, foretold, initial, pipelining, planning, reading, remat_choice, resting, watching
from experiments.presets import PRESETS
from experiments.provenance import provenance
from experiments.settings import Experiment
from experiments.tensor_overlap import takes_pieces
from experiments.tuning import Tuning, settled, trained, tuning
from experiments.work import Kind, Work
from mtl import params
from mtl.data.batches import BatchShape, batch_at
from mtl.data.samples import Samples
from mtl.errors import UserError, unknown
from mtl.generate.decode import generate
from mtl.generate.sampling import Sampling
from mtl.kernels import attention as attention_kernels
from mtl.kernels import gated, products
from mtl.models import decoder
from mtl.optim.optimizers import adamw, sgd
from mtl.optim.schedules import Schedule, schedule
from mtl.optim.transforms import Optimizer
from mtl.precision import PRECISIONS, Precision
from mtl.runtime import process
from mtl.runtime.log import RunLog
from mtl.runtime.signals import Signals
from mtl.sharding.mesh import MeshShape, make_mesh
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules, check_mesh
from mtl.train.loop import Behind, fit
from mtl.train.pipelined import Pipeline
from mtl.train.speed import flops_per_token, peak_flops, peak_memory_gib
from mtl.train.state import init_state
from mtl.train.step import StepOptions


def main(caught: Signals | None = None, kind: Kind | None = None) -> None:
    """Read the settings, check them, train, and show a sample. ``caught`` are the signals that end the run, ``kind`` is pre-training."""
    preset, setup = read_settings(process.command_line(), kind)
    start = initial.open_start(setup.init) if setup.init else None
    setup = dataclasses.replace(setup, model=initial.with_model(setup.model, PRESETS[preset].model, start)) if start else setup
    setup = settled(setup)
    at = process.place()
    process.prepare_environment(setup.deterministic, tf32=setup.precision == "tf32")
    rules, shape = choose_layout(setup, at.world)
    setup = with_micro_batch(setup, rules, shape)
    precision = choose_precision(setup, at.device)
    setup, work = (kind or PRETRAIN).work(setup)
    work = work.starting(start)
    work = work._replace(decides={**work.decides, **initial.lasting(setup.model, setup.lora, setup.optim.name)})
    check(setup, rules, shape, precision, at.device)
    with process.process_group(at):
        options = make_step_options(setup, precision, at.device)
        known, engine = sizes(setup, rules, shape), by_engine(setup, shape, at)
        setup, said = remat_choice.settled(setup, rules, shape, known, options, at.device, lambda: packed(work, setup), engine)
        work = work._replace(said=(*work.said, *said))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = setup.out or Path("runs") / f"{preset}-{stamp}"
        folder, steps = json.loads(process.on_first_rank(lambda: checkpoints.claim(out, setup.resume)))
        run(preset, setup, rules, shape, precision, at, Path(folder), steps, caught, work)


def read_settings(arguments: list[str], kind: Kind | None = None) -> tuple[str, Experiment]:
    """Take the preset's name (default tiny) from the front of the arguments and the rest as flags over it."""
    preset = arguments[0] if arguments and not arguments[0].startswith("-") else "tiny"
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    flags = arguments[1:] if arguments and arguments[0] == preset else arguments
    kind = kind or PRETRAIN
    about = f"{kind.does} {preset}. Presets: {', '.join(PRESETS)}."
    default = kind.settings(PRESETS[preset], flags)
    try:
        return preset, tyro.cli(
            type(default), args=flags, default=default, description=about, prog=f"{kind.program} {preset}",
            config=(tyro.conf.AvoidSubcommands,),
            console_outputs=process.place_rank() == 0,
        )  # fmt: skip
    except SystemExit as stop:
        process.leave_together(int(stop.code or 0))
        raise


def choose_layout(setup: Experiment, world: int) -> tuple[Rules, MeshShape]:
    """Find rules and mesh: what is given, and for what is not, what fits."""
    rules = sharding_rules.load(setup.rules) if setup.rules else None
    shape = setup.mesh.shape(world, sharding_rules.world_axis(rules) if rules else "fsdp")
    rules = rules or sharding_rules.load(sharding_rules.choose(shape))
    check_mesh(rules, shape)
    return rules, shape


def with_micro_batch(setup: Experiment, rules: Rules, shape: MeshShape) -> Experiment:
    """Settle the micro-batch size and the pipeline where they were left open."""
    setup = pipelining.settled(setup, rules, shape)
    if setup.train.micro_batch_size is not None:
        return setup
    share = math.gcd(*reading.batch_sizes(setup).sizes) // math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    size = max((n for n in range(1, 9) if share > 0 and share % n == 0), default=1)
    return dataclasses.replace(setup, train=dataclasses.replace(setup.train, micro_batch_size=size))


def micro_batch(setup: Experiment) -> int:
    """Give the settled micro-batch size."""
    return 1 if setup.train.micro_batch_size is None else setup.train.micro_batch_size


def choose_precision(setup: Experiment, device: torch.device) -> Precision:
    """Find the precision policy."""
    name = setup.precision if setup.precision != "auto" else ("bf16" if device.type in ("cuda", "xpu") else "fp32")
    return PRECISIONS[name]


def by_engine(setup: Experiment, shape: MeshShape, at: process.Place) -> bool:
    """Find whether the copy engines move weights and gradients."""
    able = process.copy_engines(at)
    if setup.transport == "engine" and not able and at.device.type != "cpu":  # on CPUs gloo stands in for them
        raise UserError("--transport engine needs NVIDIA GPUs of one host, one a process, that reach each other. Take nccl or auto.")
    return planning.takes_engines(setup, shape, able)


def parallel(setup: Experiment, rules: Rules, shape: MeshShape, precision: Precision, at: process.Place) -> Parallel:
    """Make the mesh and all that a step must know of it."""
    engine = by_engine(setup, shape, at)
    pieces = takes_pieces(setup, rules, shape, precision, engine or (at.device.type == "cpu" and setup.tensor.overlap == "on"))
    mesh, whole = make_mesh(shape, at.device.type), sizes(setup, rules, shape)
    by = products.choose(setup.products, at.device, precision.compute)
    inside = at.device.type == "cuda" and process.all_agree(by > 0 and gated.there(), at)  # it decides how weights travel
    return Parallel(mesh, rules, whole, precision.reduce, engine=engine, piecewise=pieces, fp8=precision.fp8, quack=by, gated=inside)


def sizes(setup: Experiment, rules: Rules, shape: MeshShape) -> dict[str, int]:
    """Give the size of every logical axis of this run; the batch counts a micro-batch over all devices."""
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    seq = dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), setup.train.seq_len)
    return {**decoder.sizes(setup.model), **seq, "batch": rows * micro_batch(setup)}


def check(setup: Experiment, rules: Rules, shape: MeshShape, precision: Precision, device: torch.device) -> None:
    """Refuse settings that cannot work, before any process group or folder exists."""
    model, train = setup.model, setup.train
    specs = decoder.specs(model)
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    for size in reading.batch_sizes(setup).sizes:
        BatchShape(size, micro_batch(setup), train.seq_len).check(rows)
    for name, least in (("steps", 0), ("eval_every", 0), ("eval_samples", 1)):
        if getattr(train, name) < least:
            raise UserError(f"--train.{name.replace('_', '-')} is {getattr(train, name)}: it must be at least {least}.")
    watching.check(setup)
    if model.positions == "learned" and train.seq_len > model.max_positions:
        raise UserError(
            f"--train.seq-len {train.seq_len} is longer than the model's {model.max_positions} learned positions (--model.max-positions)."
        )
    for table in ("store", "compute"):
        params.layouts(specs, rules, shape, table)
        params.layouts(trained(setup.lora).specs(model), rules, shape, table)
    known = sizes(setup, rules, shape)
    pieces = 2 if rules.order == "zigzag" else 1
    split = math.prod(getattr(shape, axis) for axis in rules.act["seq"])
    if split > 1 and train.seq_len % (split * pieces):
        raise UserError(
            f"--train.seq-len {train.seq_len} does not divide by {split * pieces}, the pieces that rules {rules.name!r} cut it into."
        )
    for name in ("seq", "residual_seq", "query_seq", "key_seq", "heads", "core_heads", "kv_heads", "core_kv_heads", "mlp", "vocab"):
        what = "--train.seq-len, activation" if "seq" in name else f"--model.{name.removeprefix('core_').replace('_', '-')}, activation"
        rules.layout("act", (name,), (known[name],), shape, what)
    make_step_options(setup, precision, device)
    takes_pieces(setup, rules, shape, precision, setup.transport != "nccl" or device.type == "cpu")
    products.choose(setup.products, device, precision.compute)
    checkpoints.check(setup.checkpoint)
    pipelining.plan(setup, shape)
    resting.check(setup, shape)
    make_optimizer(setup)
    one = torch.empty(1, 1, 1, 1, dtype=precision.compute, device=device)
    length = train.seq_len // (split * pieces) if split > 1 else train.seq_len
    q, k = (one.expand(1, length, n, decoder.attended_size(model)) for n in (model.heads, model.kv_heads))
    for offset in (0, length) if split > 1 else (0,):
        attention_kernels.choose(model.attention_impl, q, k, attention_kernels.Mask(True, model.window, offset), None)


def make_step_options(setup: Experiment, precision: Precision, device: torch.device) -> StepOptions:
    """Say how the step runs."""
    how = setup.compile if setup.compile != "auto" else ("step" if device.type == "cuda" else "none")
    return StepOptions(precision, setup.remat, how, "inductor", setup.optim.clip, setup.train.seed, offload=setup.offload)


def make_optimizer(setup: Experiment) -> tuple[Optimizer, Schedule]:
    """Make the optimizer and its schedule, or refuse settings that make none."""
    optim = setup.optim
    for name, low, high in (("lr", 0.0, math.inf), ("clip", 0.0, math.inf), ("weight_decay", 0.0, math.inf), ("eps", 0.0, math.inf)):
        if not low <= getattr(optim, name) < high:
            raise UserError(f"--optim.{name.replace('_', '-')} is {getattr(optim, name)}: it must be a number from 0 on.")
    for name in ("beta1", "beta2"):
        if not 0.0 <= getattr(optim, name) < 1.0:
            raise UserError(f"--optim.{name} is {getattr(optim, name)}: it must lie from 0 to under 1.")
    rate = schedule(optim.schedule, optim.lr, setup.train.steps, optim.warmup_steps, optim.min_lr_ratio)
    mask = params.decayed(trained(setup.lora).specs(setup.model))
    if optim.name == "adamw":
        return adamw(mask, optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.impl), rate
    return sgd(mask, optim.beta1, False, optim.weight_decay), rate


PRETRAIN = Kind("pretrain.py", "Pre-train", reading.settings, reading.work)


def run(
    preset: str, setup: Experiment, rules: Rules, shape: MeshShape, precision: Precision, at: process.Place, folder: Path,
    steps: list[int], caught: Signals | None, work: Work,
) -> Any:  # fmt: skip
    """Train and give the final state. ``steps`` are those whose checkpoints the folder holds."""
    model, train = setup.model, setup.train
    par = parallel(setup, rules, shape, precision, at)
    optimizer, rate = make_optimizer(setup)
    fresh = partial(init_state, seed=train.seed)
    tuned = tuning(setup.lora, model, par, precision, work.begin or fresh)
    specs = tuned.model.specs(model)
    pipeline = pipelining.plan(setup, shape)
    choices = resolved(par, shape, precision) | {"pipeline": pipelining.described(setup, pipeline)}
    whole = {"preset": preset, **dataclasses.asdict(setup), "resolved": choices, "decides": dict(work.decides), **provenance()}
    keeper = checkpoints.Keeper(setup.checkpoint, folder, at, whole, lambda i: {"samples": taken(i)}, caught)
    length = work_length(work, par, train.seq_len)
    behind = Behind(lambda i: watching.may_wait(setup, at, shape, keeper.first, i) and length(i) == length(i - 1))
    options = make_step_options(setup, precision, at.device)
    options = dataclasses.replace(options, before_update=keeper.before_update, under_way=behind.settle)
    timing, rest = pipelining.Timing(train.steps), resting.Rest(setup.offload, specs, par.mesh, precision)
    weights = rest.weights(par)
    step = by_length(par, lambda p: pipelining.make_steps(pipeline, model, p, optimizer, rate, options, timing, tuned, weights))
    keeper.extra = work.beside
    plan = foretold.foretell(setup, shape, par, options, at.device, at.rank == 0, lambda: packed(work, setup))
    state = keeper.begin(
        steps, setup.resume, lambda contents: rest.asked(contents, rules, optimizer),
        lambda: rest.fresh(tuned.begin(fresh, work.begin), rules, optimizer), rest.restored,
    )  # fmt: skip
    wandb = {"project": setup.log.project, "name": folder.name, "config": dataclasses.asdict(setup)} if setup.log.wandb else None
    log = RunLog(folder, at.rank == 0, train.steps, wandb and wandb | {"id": keeper.run_id, "resume": "allow"}, keeper.first)
    about = f"{preset}: {params.count(specs) / 1e6:.1f} M parameters{tuned.said(model)}, {precision.name} on {at.world} x {at.device.type}"
    layout = f"mesh {shape}, rules {rules.name}{'' if setup.rules else ' (chosen from the mesh)'}; run folder {folder}"
    for line in (about, layout, *work.said, *pipelining.said(setup, pipeline)):
        log.say(line)
    foretold.show(plan, folder, preset, log)
    keeper.start(state, log)
    taken = reading.taken(reading.batch_sizes(setup), keeper.first, keeper.data)
    batch = reading.feed(setup, work, par, precision.param, micro_batch(setup), keeper.first, taken, length)
    hooks = [
        measured(setup, at, length),
        reading.counted(work, taken, batch),
        evaluated(setup, par, precision, work, pipeline, tuned, rest),
        plan.hook(train.steps, log),
        watching.compiling(log),
        lambda i, state, record: log.write(tidy(record)),
        timing.hook(folder, at.rank == 0),
    ]
    try:
        keeper.replay(state, hooks)
        hooks += watching.profiled(setup, at, folder, f"{preset}, {precision.name}, mesh {shape}, rules {rules.name}", keeper.first, log)
        state = fit(state, step, batch, range(keeper.first, train.steps), [keeper.step_done, *hooks, keeper.save_if_due], behind)
        keeper.finish()
        text = sample(setup, par, precision, rest.usable(state.params), work, tuned) if train.steps else ""
    finally:
        keeper.settle()
        batch.close()
        log.close()
    log.say(f"\nsample:\n{text}\n\nrun folder: {folder} (config.json, metrics.jsonl, checkpoints)")
    log.say(f"next: {work.following.replace('RUN', str(folder)).replace('PRESET', preset)}")
    return state


def packed(work: Work, setup: Experiment) -> bool:
    """Say whether samples hold several documents that attention keeps apart."""
    return work.train(0, setup.train.seq_len).segments is not None


def resolved(par: Parallel, shape: MeshShape, precision: Precision) -> dict[str, Any]:
    """Say what the automatic choices came to."""
    rules = par.rules
    tables = {name: dict(getattr(rules, name)) for name in ("store", "compute", "act")}
    how = {"gather": rules.gather, "order": rules.order, "transport": "engine" if par.engine else "collectives"}
    how |= {"tensor_overlap": "on" if par.piecewise else "off", "products": "quack" if par.quack else "torch"}
    how |= {"gates": "inside products" if par.gated else "between products"}
    return {"rules": rules.name, **tables, **how, "mesh": shape.sizes(), "precision": precision.name}


def work_length(work: Work, par: Parallel, seq_len: int) -> Callable[[int], int]:
    """Give the length of each step's sequences, divisible by the pieces that the rules cut them into."""
    if (length := work.length) is None:
        return lambda i: seq_len
    pieces = math.lcm(*(par.mesh.size(par.axes(letter)) for letter in "RSQT")) * (2 if par.rules.order == "zigzag" else 1)
    return lambda i: length(i, pieces)


def by_length(par: Parallel, make: Callable[[Parallel], Any]) -> Any:
    """Make a step that takes batches of several lengths: one step each, made when it is first needed."""
    known: dict[int, Any] = {}

    def step(state: Any, batch: Any) -> Any:
        length: int = batch["tokens"].shape[-1] * par.mesh.size(par.axes("S"))
        if length not in known:
            seq = dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), length)
            known[length] = make(par.sized(**seq))
        return known[length](state, batch)

    return step


def measured(setup: Experiment, at: process.Place, length: Callable[[int], int]) -> Callable[[int, Any, dict[str, Any]], None]:
    """Make the hook that adds speed and memory."""
    peak, counts = peak_flops(at.device), reading.batch_sizes(setup)
    specs, thin = decoder.specs(setup.model), trained(setup.lora).specs(setup.model) if setup.lora.rank else None
    flops = {name: flops_per_token(specs, setup.model, setup.train.seq_len, name == "mfu", thin) for name in ("mfu", "mfu_full_attention")}

    def hook(i: int, state: Any, record: dict[str, Any]) -> None:
        rate = counts.size(i - 1) * length(i - 1) / record["step_time"] / at.world
        record["tokens_per_second_per_device"] = rate
        record |= {name: None if peak is None else rate * count / peak for name, count in flops.items()}
        record["peak_memory_gib"] = peak_memory_gib(at.device)

    return hook


def evaluated(
    setup: Experiment, par: Parallel, precision: Precision, work: Work, pipeline: Pipeline | None, tuned: Tuning, rest: resting.Rest
) -> Callable[[int, Any, dict[str, Any]], None]:
    """Make the hook that evaluates every so many steps and at the end."""
    train = setup.train
    rows = par.mesh.size(par.axes("B")) * micro_batch(setup)
    samples, held_out = work.held_out_samples, work.held_out
    rows *= min(setup.pipeline.microbatches or 1, -(-samples // rows)) or 1  # a pipeline takes several micro-batches at once
    count = -(-samples // rows)
    evaluate = pipelining.make_evaluation(pipeline, setup.model, par, precision, tuned.whole)
    shape = BatchShape(rows, micro_batch(setup), train.seq_len)

    def loss_on(found: Samples, weights: Any) -> float:
        batches = (batch_at(par, found, n * rows, shape, precision.param, samples) for n in range(count))
        return evaluate(tuned.params(rest.usable(weights)), batches)

    def hook(i: int, state: Any, record: dict[str, Any]) -> None:
        if held_out is not None and (i == train.steps or (train.eval_every and i % train.eval_every == 0)):
            record["eval_loss"] = loss_on(held_out, state.params)
            if work.bytes_per_token:
                record["eval_bits_per_byte"] = record["eval_loss"] / math.log(2) / work.bytes_per_token
        if work.test is not None and i == train.steps:
            record["test_loss"] = loss_on(work.test, state.params)

    return hook


def tidy(record: dict[str, Any]) -> dict[str, Any]:
    """Keep what metrics.jsonl shows."""
    return {name: value for name, value in record.items() if name not in ("losses", "good", "entropy")}


def sample(setup: Experiment, par: Parallel, precision: Precision, weights: Any, work: Work, tuned: Tuning, count: int = 120) -> str:
    """Write on from the work's prompt, token by token; every device of the mesh takes part and gets the same text."""
    start = list(work.prompt[: max(setup.train.seq_len - 1, 1)])
    count, how = min(count, setup.train.seq_len - len(start)), Sampling(0.7, seed=setup.train.seed)
    new = generate(tuned.whole, setup.model, par.mesh, par.rules, precision, tuned.params(weights), [start], count, how, work.ends)
    return work.decode(start + [t[0] or 0 for t in new])


if __name__ == "__main__":
    process.guarded(lambda: main(CAUGHT))
