"""Search for a mesh: try those that can divide the model and the batch, plan each, and say why the others lose."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import sharding_rules
from experiments import planning
from experiments.settings import Experiment, PipelineSettings
from mtl.errors import UserError
from mtl.inspect.hardware import Device
from mtl.inspect.placement import table
from mtl.inspect.plan import Plan
from mtl.models import decoder
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import Rules
from mtl.train.step import StepOptions

SCHEDULES = ("1f1b", "zb_v")
"""Pipelines' schedules that a search tries: the one that stores least, and the one that waits least."""
LONG = 16384
"""From so many tokens a sample on, meshes that split the sequence are tried although the batch would fill the devices."""


@dataclass(frozen=True)
class Candidate:
    """One way to run."""

    mesh: MeshShape
    rules: str
    remat: str
    micro_batch: int
    micro_batches: int
    schedule: str | None = None
    """Of the pipeline, where the mesh has one."""

    def __str__(self) -> str:
        """Spell it as flags would."""
        how = f", schedule {self.schedule}" if self.schedule else ""
        return f"mesh {self.mesh}, rules {self.rules}, remat {self.remat}, micro-batch {self.micro_batch} x {self.micro_batches}{how}"


@dataclass(frozen=True)
class Found:
    """What a search found: plans that fit from the fastest on, those that do not, and meshes that could not be planned, with the reason."""

    fits: list[tuple[Candidate, Plan]]
    large: list[tuple[Candidate, Plan]]
    refused: list[tuple[str, str]]
    budget: int


def search(setup: Experiment, devices: int, budget: int, tokens: int, device: Device) -> Found:
    """Plan every candidate; refuse a budget in which nothing fits, naming what comes closest."""
    seq = setup.train.seq_len
    if tokens % seq or tokens < seq:
        raise UserError(f"a step of {tokens:,} tokens does not divide into samples of --train.seq-len {seq}. Use a multiple of {seq}.")
    samples = tokens // seq
    fits: list[tuple[Candidate, Plan]] = []
    large: list[tuple[Candidate, Plan]] = []
    refused: list[tuple[str, str]] = []
    for mesh in (*meshes(devices, device.node_size, seq, samples), *pipelines(devices, device.node_size, setup.model.layers)):
        for rules in tables(mesh):
            rows = math.prod(getattr(mesh, axis) for axis in rules.act["batch"])
            name = f"mesh {mesh}, rules {rules.name}"
            if samples % rows:
                refused.append((name, f"{samples} samples a step do not divide over {rows} data-parallel devices"))
                continue
            try:
                copies = 3 if setup.optim.name == "adamw" else 2
                at_rest = table(decoder.specs(setup.model), rules, mesh, PRECISIONS[setup_precision(setup)]).rest_bytes * copies
                if at_rest > budget:
                    lack = (at_rest - budget) / 2**30
                    refused.append((name, f"weights and optimizer alone take {at_rest / 2**30:.1f} GiB, {lack:.1f} GiB too much"))
                    continue
                attempt = _try_pipeline if mesh.pipe > 1 else _try_all
                attempt(setup, mesh, rules, rows, samples, budget, device, fits, large)
            except UserError as error:
                refused.append((name, str(error)))
    if not fits:
        raise nothing_fits(large, refused, budget, devices)
    fits.sort(key=lambda pair: (pair[1].step or math.inf, pair[1].memory.peak))
    return Found(fits, sorted(large, key=lambda pair: pair[1].memory.peak), refused, budget)


def _try_all(
    setup: Experiment, mesh: MeshShape, rules: Rules, rows: int, samples: int, budget: int, device: Device,
    fits: list[tuple[Candidate, Plan]], large: list[tuple[Candidate, Plan]],
) -> None:  # fmt: skip
    """Plan a mesh with each remat, and with larger micro-batches while there is room."""
    for remat in (each for each in ("none", "gather", "selective", "mlp", "dense", "full") if each != "gather" or mesh.tensor > 1):
        size = 1
        while size <= 8 and samples % (rows * size) == 0:
            candidate = Candidate(mesh, rules.name, remat, size, samples // (rows * size))
            plan = plan_one(setup, candidate, rules, samples, device)
            (fits if plan.memory.peak <= budget else large).append((candidate, plan))
            if plan.memory.peak > budget * 0.6:
                break
            size *= 2
        if size > 1 and remat == "none":
            break  # computing again saves memory, and there is enough without


def _try_pipeline(
    setup: Experiment, mesh: MeshShape, rules: Rules, rows: int, samples: int, budget: int, device: Device,
    fits: list[tuple[Candidate, Plan]], large: list[tuple[Candidate, Plan]],
) -> None:  # fmt: skip
    """Plan a pipeline of single samples with each schedule; where one does not fit, with layers computed again."""
    micros = samples // rows
    if micros < mesh.pipe:
        raise UserError(f"{micros} micro-batches are too few for a pipeline of {mesh.pipe}")
    for schedule in SCHEDULES:
        if setup.model.layers < mesh.pipe * (2 if schedule == "zb_v" else 1):
            continue
        for remat in ("none", "full"):
            candidate = Candidate(mesh, rules.name, remat, 1, micros, schedule)
            plan = plan_one(setup, candidate, rules, samples, device)
            (fits if plan.memory.peak <= budget else large).append((candidate, plan))
            if plan.memory.peak <= budget:
                break


def plan_one(setup: Experiment, candidate: Candidate, rules: Rules, samples: int, device: Device) -> Plan:
    """Plan one candidate."""
    train = dataclasses.replace(setup.train, global_batch_size=samples, micro_batch_size=candidate.micro_batch)
    piped = PipelineSettings(candidate.schedule, microbatches=candidate.micro_batches if candidate.schedule else None)
    setup = dataclasses.replace(setup, train=train, pipeline=piped)
    rows = math.prod(getattr(candidate.mesh, axis) for axis in rules.act["batch"])
    seq = dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), train.seq_len)
    sizes = {**decoder.sizes(setup.model), **seq, "batch": rows * candidate.micro_batch}
    planning.check_sizes(setup, rules, candidate.mesh, sizes)
    options = StepOptions(PRECISIONS[setup_precision(setup)], candidate.remat, setup_compile(setup), clip=setup.optim.clip)
    engine = planning.by_engine(setup, candidate.mesh, device)
    return planning.plan(setup, planning.job_for(setup, rules, candidate.mesh, sizes, options, "meta", engine=engine), device)


def setup_precision(setup: Experiment) -> str:
    """Name the precision; automatic is what GPUs take."""
    return "bf16" if setup.precision == "auto" else setup.precision


def setup_compile(setup: Experiment) -> str:
    """Name the compile mode; automatic is what GPUs take."""
    return "step" if setup.compile == "auto" else setup.compile


def meshes(devices: int, node: int, seq: int, samples: int) -> Iterator[MeshShape]:
    """Give the meshes worth a try: tensor parallelism within a node, the sequence split where it is long or samples are few."""
    for tensor in (n for n in _divisors(devices) if n <= min(node, 8)):
        left = devices // tensor
        for context in (n for n in _divisors(left) if n <= 16 and (n == 1 or seq >= LONG or samples < left)):
            rest = left // context
            for fsdp in {rest, max(1, math.gcd(rest, node // math.gcd(node, tensor))), 1}:
                yield MeshShape(replica=rest // fsdp, fsdp=fsdp, context=context, tensor=tensor)


def pipelines(devices: int, node: int, layers: int) -> Iterator[MeshShape]:
    """Give the pipelines worth a try: beside them tensor parallelism within a node and copies of the whole."""
    for pipe in (n for n in (2, 4, 8, 16) if devices % n == 0 and n <= layers):
        for tensor in (n for n in _divisors(devices // pipe) if n <= min(node, 8)):
            yield MeshShape(pipe=pipe, replica=devices // pipe // tensor, tensor=tensor)


def tables(mesh: MeshShape) -> Iterator[Rules]:
    """Give the tables worth a try on a mesh."""
    first = sharding_rules.choose(mesh)
    others = {"context": ("ring", "ulysses"), "fsdp_context_tensor": ("fsdp_ring_tensor", "fsdp_ulysses_tensor"), "hsdp": ("zero1",),
              "fsdp": ("zero1",)}  # fmt: skip
    for name in (first, *others.get(first, ())):
        rules = sharding_rules.load(name)
        if set(mesh.active()) <= set(rules.used()):
            yield rules


def nothing_fits(large: list[tuple[Candidate, Plan]], refused: list[tuple[str, str]], budget: int, devices: int) -> UserError:
    """Say what comes closest to a budget, and what it lacks."""
    about = f"nothing fits {budget / 2**30:.1f} GiB a device on {devices} devices"
    if large:
        candidate, plan = min(large, key=lambda pair: pair[1].memory.peak)
        lack = (plan.memory.peak - budget) / 2**30
        most = max(plan.memory.parts, key=lambda part: plan.memory.parts[part])
        return UserError(
            f"{about}. Closest: {candidate}, which needs {plan.memory.peak / 2**30:.1f} GiB, {lack:.1f} GiB more (most of it {most}, "
            f"{plan.memory.parts[most] / 2**30:.1f} GiB). Use more devices, more memory, or shorter sequences."
        )
    name, why = refused[0] if refused else ("no mesh", "none divides")
    sized = [(float(m[1]), n, w) for n, w in refused if (m := re.search(r"take ([\d.]+) GiB", w))]
    if sized:
        _, name, why = min(sized)
    return UserError(f"{about}. Closest: {name}: {why}. Use more devices, more memory, or another batch.")


def as_text(found: Found, show: int) -> str:
    """Draw proposals, and why the others lose."""
    lines: list[str] = []
    best = found.fits[0][1].step or 0.0
    for i, (candidate, plan) in enumerate(found.fits[:show]):
        lines += ["", f"{i + 1}. {candidate}", f"   {_numbers(plan)}"]
    lines += ["", "why the others lose"]
    for candidate, plan in found.fits[show : show + 6]:
        lines.append(f"  {candidate}: {(plan.step or 0.0) / best - 1:.0%} slower; {_slow(plan, found.fits[0][1])}")
    for candidate, plan in found.large[:6]:
        lines.append(f"  {candidate}: needs {plan.memory.peak / 2**30:.1f} GiB, {(plan.memory.peak - found.budget) / 2**30:.1f} too much")
    lines += [f"  {name}: {why}" for name, why in found.refused[:6]]
    left = max(0, len(found.fits) - show - 6) + max(0, len(found.large) - 6) + max(0, len(found.refused) - 6)
    return "\n".join([*lines, *([f"  and {left} more"] if left else [])])


def as_json(found: Found, show: int) -> dict[str, object]:
    """Give a search's result as plain values."""

    def spell(pair: tuple[Candidate, Plan]) -> dict[str, object]:
        candidate, plan = pair
        chosen = {**dataclasses.asdict(candidate), "mesh": candidate.mesh.sizes()}
        return {**chosen, **plan.as_json()}

    others = [(str(c), f"{(p.step or 0.0):.3f} s a step") for c, p in found.fits[show:]]
    others += [(str(c), f"needs {p.memory.peak} bytes") for c, p in found.large]
    return {"proposals": [spell(pair) for pair in found.fits[:show]], "others": [*others, *found.refused]}


def parse_bytes(text: str) -> int:
    """Read 80GiB, 80GB or a number of bytes."""
    match = re.fullmatch(r"([\d.]+)\s*(|B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)", text.strip())
    units = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    if match is None or match[1].count(".") > 1 or not match[1].strip("."):
        raise UserError(f"--memory is {text!r}: expected a number with a unit, such as 80GiB or 80GB.")
    return int(float(match[1]) * units[match[2]])


def parse_count(text: str, flag: str) -> int:
    """Read 4M (4 x 2**20), 512K or a number."""
    match = re.fullmatch(r"(\d+)(|K|M)", text.strip())
    if match is None or int(match[1]) == 0:
        raise UserError(f"{flag} is {text!r}: expected a number of tokens, such as 4M (4 x 2**20), 512K or 1048576.")
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _numbers(plan: Plan) -> str:
    speed = "" if plan.tokens_per_second is None else f", {plan.tokens_per_second:,.0f} tokens/s/device"
    mfu = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
    return f"{plan.memory.peak / 2**30:.1f} GiB (peak at: {plan.memory.when}), {plan.step or 0.0:.2f} s a step{speed}{mfu}"


def _slow(plan: Plan, best: Plan) -> str:
    """Name the part of a step that differs most from the best one's."""
    if plan.seconds is None or best.seconds is None:
        return ""
    mine, theirs = plan.seconds, best.seconds
    part = max(("products", "attention", "other kernels", "communication shown", "bubble"), key=lambda name: mine[name] - theirs[name])
    return f"{part} {mine[part]:.2f} s against {theirs[part]:.2f}"
