"""`mtl plan`: products and bytes on the wire equal what ranks really do, exactly; memory and time those measured, within bounds."""

import dataclasses
import itertools
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import plan_search, planning, pretrain, recording
from experiments.presets import PRESETS
from experiments.settings import MeshSettings
from mtl.cli import plan as command
from mtl.errors import UserError
from mtl.inspect import hardware, record
from mtl.inspect.count import count
from mtl.inspect.operations import attention_room, band
from mtl.inspect.plan import PARTS, make_plan, memory
from mtl.inspect.record import Wire
from mtl.inspect.timing import beside_product, traffic
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.params import decayed
from mtl.precision import PRECISIONS
from mtl.runtime import process
from mtl.sharding.mesh import MeshShape
from mtl.train.speed import flops_per_token
from mtl.train.step import StepOptions
from sharding_rules import choose, load
from tests import browser
from tests.cases.inspect import job_of, planned_counts
from tests.ranks import Ranks
from tests.small import MESHES, MODELS

REMATS, HOWS = ("none", "gather", "selective", "full", "every:2"), ("none", "step", "block")
Case = tuple[tuple[str, int], str, str, str]
PLACES = [(name, world) for name, worlds in MESHES.items() for world in worlds]
FULL: list[Case] = list(itertools.product(PLACES, MODELS, REMATS, HOWS))
random.Random(2).shuffle(FULL)
_EAGER: list[Case] = [
    ((name, 4 if name == "hsdp" else min(worlds)), list(MODELS)[(i + i // 6) % 6], REMATS[i % 5], "none")
    for i, (name, worlds) in enumerate(MESHES.items())
]
SOME: list[Case] = [
    *_EAGER,
    (("ring", 4), "llama", "none", "none"),
    (("fsdp_context_tensor", 4), "mistral", "full", "none"),
    (("tensor", 2), "llama", "full", "step"),
    (("ulysses", 2), "falcon", "selective", "block"),
    (("fsdp_tensor", 4), "falcon", "mlp", "none"),
    (("ulysses", 2), "llama", "mlp:2", "none"),
    (("ring", 2), "gpt", "dense", "none"),
]
MORE: list[Case] = [
    (("fsdp_context_tensor", 8), "mistral", "full", "none"),
    (("fsdp", 2), "gpt", "none", "step"),
    (("tensor", 2), "llama", "full", "block"),
    (("ulysses", 2), "llama", "dense", "step"),
]


def check(ranks: Ranks, case: Case, micros: int = 1) -> None:
    """Compare a plan with what ranks do in a step."""
    (name, world), model, remat, how = case
    ask = ranks.run if how == "none" else ranks.capture  # what is captured has no numbers
    done = ask("tests.cases.inspect:step_counts", world, table=name, world=world, model=model, remat=remat, how=how, micros=micros)
    assert planned_counts(name, world, model, remat, how, micros) == done
    assert done["times"]["matmul"] > 3 * 6


@pytest.mark.parametrize("case", SOME, ids=lambda c: "-".join(str(x) for x in (*c[0], *c[1:])))
def test_counts_are_those_of_the_real_step(ranks: Ranks, case: Case) -> None:
    check(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MORE, *FULL], ids=lambda c: "-".join(str(x) for x in (*c[0], *c[1:])))
def test_counts_in_every_table_remat_and_mode(ranks: Ranks, case: Case) -> None:
    check(ranks, case)


def test_micro_batches_multiply_the_gradient_alone(ranks: Ranks) -> None:
    check(ranks, (("fsdp", 2), "llama", "none", "none"), micros=3)
    check(ranks, (("zero1", 2), "llama", "none", "none"), micros=3)


SHORT = [("none", "none"), ("full", "step"), ("every:2", "none")]
NOT_SHORT = [(remat, how) for how in ("none", "step") for remat in REMATS if (remat, how) not in SHORT]


@pytest.mark.parametrize(("remat", "how"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in NOT_SHORT)])
def test_short_models_tell_what_long_ones_do(remat: str, how: str) -> None:
    """Seven layers or nine, recorded whole: the same products, bytes and peak as extrapolated from fewer."""
    layers = 9 if remat == "every:2" else 7
    job = job_of("fsdp_tensor", 4, "llama", remat, how, layers=layers)
    records = recording.record(job)
    assert records.rounds >= 1
    whole = recording.record_gradient(job, layers)
    assert count(records.ran(whole)) == records.counts()["gradient"]
    exact = dataclasses.replace(records, few=whole, more=whole, rounds=0)
    assert memory(records).peak == pytest.approx(memory(exact).peak, rel=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_weights_gathered_ahead_count_once(remat: str) -> None:
    """What the first gathers of a short model lack is no cost of a layer: many thin shards, whose peak lies where that would show."""
    job, _ = preset_job("llama3_70b", MeshShape(fsdp=256), 1, 4096, 11, remat=remat)
    records = recording.record(job)
    whole = recording.record_gradient(job, 11)
    assert records.rounds >= 3
    found, exact = memory(records), memory(dataclasses.replace(records, few=whole, more=whole, rounds=0))
    assert found.parts == exact.parts and found.when == exact.when


@pytest.mark.parametrize("name", MESHES)
def test_every_table_is_planned_for_gpus(name: str) -> None:
    """On tensors without memory some kernels differ from the CPU's: all must be recorded, packed documents too."""
    mesh = MESHES[name][max(MESHES[name])]
    model = dataclasses.replace(MODELS["mistral"], head_size=8)
    sizes = {**decoder.sizes(model), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), 64), "batch": 8}
    options = StepOptions(PRECISIONS["bf16"], "selective", "step")
    optimizer = adamw(decayed(decoder.specs(model)))
    job = recording.Job(model, load(name), mesh, sizes, options, optimizer, schedule("constant", 1.0, 1), 1)
    apart = [count(recording.record_gradient(dataclasses.replace(job, documents=d), 1).ops) for d in (False, True)]
    assert apart[0].matmul_flops == apart[1].matmul_flops > 0
    assert apart[0].attention_flops > 0 and apart[1].attention_flops > 0


def test_layers_that_differ_are_told_apart() -> None:
    config = dataclasses.replace(MODELS["mistral"], layers=6, full_layers=(1, 3, 5))
    job = dataclasses.replace(job_of("single", 1, "mistral", "none", "none"), config=config)
    assert recording.repeat(job) == 2
    assert recording.repeat(dataclasses.replace(job, config=dataclasses.replace(config, full_layers=(5,)))) == 6


def preset_job(name: str, mesh: MeshShape, micro: int, seq: int, layers: int | None = None, **options: Any) -> tuple[recording.Job, int]:
    """Describe a preset's step on H200s in bf16."""
    config = PRESETS[name].model
    config = dataclasses.replace(config, layers=layers or config.layers)
    rules = load(choose(mesh))
    rows = math.prod(getattr(mesh, axis) for axis in rules.act["batch"])
    seqs = dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), seq)
    sizes = {**decoder.sizes(config), **seqs, "batch": rows * micro}
    chosen = StepOptions(PRECISIONS["bf16"], **{"compile": "step", **options})
    optimizer = adamw(decayed(decoder.specs(config)))
    return recording.Job(config, rules, mesh, sizes, chosen, optimizer, schedule("constant", 1.0, 1), 1), rows * micro * seq


def test_llama3_8b_over_four_by_hand() -> None:
    """FSDP: layers twice, fused head once, in bf16; gradients once, in bf16 too; 6 N products a token. Of the embedding the ids of all
    tokens (8 bytes), and each device's rows and their gradients in bf16.
    """
    job, tokens = preset_job("llama3_8b", MeshShape(fsdp=4), 2, 8192)
    found = recording.record(job).counts()["gradient"]
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    table = 128256 * 4096
    assert found.bytes["all_gather", ("fsdp",)] == 2 * (2 * 32 * layer + table) + 8 * tokens
    assert found.bytes["all_to_all", ("fsdp",)] == 2 * (32 * layer + table) + 2 * 2 * tokens // 4 * 4096
    assert found.matmul_flops == 6 * (32 * layer + table) * tokens // 4
    pairs = 8192 * 8193 // 2
    assert found.attention_flops == (4 + 10) * 2 * 32 * 128 * pairs * 32
    rest = recording.record(job).rest
    norms = 65 * 4096
    assert rest["weights"] == 4 * ((32 * layer + 2 * table) // 4 + norms)
    assert rest["optimizer"] == pytest.approx(2 * rest["weights"], abs=8)


def test_weights_of_llama3_8b_in_fp8_travel_in_8_bits() -> None:
    """Layers twice, a byte an element; head in bf16; gradients as before; scales of 7 weights of 32 layers once, float32."""
    job, tokens = preset_job("llama3_8b", MeshShape(fsdp=4), 2, 8192)
    eight = dataclasses.replace(job, options=dataclasses.replace(job.options, precision=PRECISIONS["fp8"]))
    records = {"bf16": recording.record(job), "fp8": recording.record(eight)}
    layer, table = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336, 128256 * 4096
    sent = {name: found.total().bytes for name, found in records.items()}
    assert sent["fp8"]["all_gather", ("fsdp",)] == 2 * 32 * layer + 2 * table + 8 * tokens
    assert sent["fp8"]["all_to_all", ("fsdp",)] == sent["bf16"]["all_to_all", ("fsdp",)]
    assert sent["fp8"]["all_reduce", ("fsdp",)] - sent["bf16"]["all_reduce", ("fsdp",)] == 4 * 7 * 32
    times = [found.total().times["all_reduce", ("fsdp",)] for found in records.values()]
    assert times[1] == times[0] + 1


@pytest.mark.parametrize(("table", "world", "model", "remat", "precision"), [
    ("fsdp_tensor", 4, "falcon", "selective", "fp64"), ("zero1", 2, "llama", "none", "fp64"), ("fsdp", 2, "llama", "none", "fp8"),
    pytest.param("fsdp", 4, "llama", "none", "fp64", marks=pytest.mark.slow),
    pytest.param("hsdp", 4, "gpt", "full", "fp64", marks=pytest.mark.slow),
])  # fmt: skip
def test_slots_of_copy_engines_are_those_of_a_real_step(
    ranks: Ranks, table: str, world: int, model: str, remat: str, precision: str
) -> None:
    choices = {"table": table, "world": world, "model": model, "remat": remat, "precision": precision}
    found = ranks.run("tests.cases.inspect:engine_transfers", world, **choices)
    assert {kind for kind, *_ in found["ran"]} == (set() if table == "zero1" else {"gather", "sum"})
    assert set(map(tuple, found["ran"])) == set(map(tuple, found["planned"]))
    assert found["part"] == found["room"]


def test_slots_of_llama3_8b_by_hand() -> None:
    """Slots are as large as the largest transfer: gate and up for gathers, a vocabulary beside it, and its gradient for sums."""
    job, _ = preset_job("llama3_8b", MeshShape(fsdp=4), 2, 8192)
    assert "transfer slots" not in recording.record(job).rest
    records = recording.record(dataclasses.replace(job, engine=True))
    gate_up, vocab = 2 * 2 * 14336 * 4096, 2 * 128256 * 4096
    assert records.rest["transfer slots"] == (4 * gate_up + vocab) // 4 + 3 * vocab + 3 * 2 * 4096
    assert memory(records).parts["transfer slots"] == records.rest["transfer slots"]
    assert records.total().bytes == recording.record(job).total().bytes, "the same weights travel, and as often"


def test_plans_take_copy_engines_where_runs_do() -> None:
    setup, h200 = PRESETS["llama3_8b"], hardware.load("h200")
    assert planning.by_engine(setup, MeshShape(fsdp=8), h200)
    assert not planning.by_engine(setup, MeshShape(fsdp=16), h200), "two nodes"
    assert not planning.by_engine(setup, MeshShape(), h200) and not planning.by_engine(setup, MeshShape(fsdp=2), hardware.load("l4"))
    assert not planning.by_engine(dataclasses.replace(setup, compile="block"), MeshShape(fsdp=8), h200)
    assert planning.by_engine(dataclasses.replace(setup, transport="engine"), MeshShape(fsdp=8), hardware.load("l4"))
    assert planning.by_engine(setup, MeshShape(pipe=4), h200) and not planning.by_engine(setup, MeshShape(pipe=2, fsdp=4), h200)


def test_runs_take_copy_engines_where_plans_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no axis of the mesh given, or with one: what is left open must not read as a pipeline."""
    monkeypatch.setattr(process, "copy_engines", lambda at: True)
    at, given = process.Place(0, 4, 0, torch.device("cuda", 0)), MeshSettings(fsdp=4)
    for mesh in (MeshSettings(), given):
        assert pretrain.by_engine(dataclasses.replace(PRESETS["llama3_8b"], mesh=mesh), mesh.shape(4, "fsdp"), at)
    assert not pretrain.by_engine(dataclasses.replace(PRESETS["llama3_8b"], transport="nccl"), given.shape(4, "fsdp"), at)


@pytest.mark.parametrize(("how", "most"), [("none", 1), ("step", 2)])
def test_full_remat_keeps_the_inputs_of_layers(how: str, most: int) -> None:
    """By hand: the input of a layer, batch x tokens x embed in bf16; compiled, at most the two sums that it is computed from."""
    jobs = [preset_job("llama_1b", MeshShape(), 2, 4096, layers=n, remat="full", compile=how)[0] for n in (4, 8)]
    kept: list[int] = []
    for job in jobs:
        records = recording.record(job)
        life = records.life(recording.record_gradient(job, job.config.layers))
        head = next(k.place for k in life.kernels if k.op.scope == "head")
        kept.append(life.alive(head)["activations"])
    small, large = kept
    one = 2 * 4096 * 2048 * 2
    assert one <= (large - small) / 4 <= most * one


def kept_by_a_layer(tensor: int, how: str) -> float:
    """Give what one layer of GPT-3's shape keeps for backward on one device, in bytes, divided by (tokens x embed / tensor)."""
    kept: list[int] = []
    for layers in (3, 5):
        job, _ = preset_job("gpt3_175b", MeshShape(tensor=tensor), 1, 2048, layers=layers, compile=how, remat="gather")
        records = recording.record(job)
        life = records.life(recording.record_gradient(job, layers))
        head = next(k.place for k in life.kernels if k.op.scope == "head")
        kept.append(life.alive(head)["activations"])
    return (kept[1] - kept[0]) / 2 / (2048 * 12288 / tensor)


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_layers_keep_less_than_megatrons_formula_under_tensor_parallelism(tensor: int) -> None:
    """Megatron-LM keeps 34 s b h / t with sequence parallelism and fused attention (Korthikanti et al., 2022): all is divided by t.

    Ours has no dropout (2 less) and computes GELU again (8 less). Inputs of products kept whole would be 4 s b h, divided by nothing.
    """
    eager, compiled = kept_by_a_layer(tensor, "none"), kept_by_a_layer(tensor, "step")
    assert eager == pytest.approx(28, abs=0.1), "norms keep their inputs in float32: 4 more"
    assert compiled == pytest.approx(24, abs=0.1)


def test_communication_beside_products_is_told_apart() -> None:
    """Under tensor parallelism two gathers and two sums of a layer's backward each run beside a product; the forward's show."""
    job, _ = preset_job("llama3_8b", MeshShape(tensor=2), 2, 8192, layers=2, remat="gather")
    trace = recording.record_gradient(job, 2)
    life = recording.record(job).life(trace)
    beside = [k.op for i, k in enumerate(life.kernels) if beside_product(life, i)]
    assert sorted(op.name for op in beside) == ["all_gather_into_tensor"] * 4 + ["all_to_all_single"] * 4
    assert {op.scope for op in beside} == {"backward"}


def test_an_mlp_in_pieces_leaves_one_gradient_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 2 bytes of a weight and 4 of its gradient a layer, whereas eight pieces' gradients would be 16 bytes."""
    monkeypatch.setattr(decoder, "MLP_BYTES", 65536 * 2 * 8192 * 2 // 8)
    peaks: list[int] = []
    for layers in (4, 8):
        job, _ = preset_job("llama_1b", MeshShape(), 1, 65536, layers=layers, remat="full", compile="step", offload="both")
        peaks.append(memory(planning.record(job)).peak)
    layer = 2048 * (2 * 32 + 2 * 8) * 64 + 3 * 2048 * 8192
    assert 5 * layer < (peaks[1] - peaks[0]) / 4 < 6.1 * layer


@pytest.mark.parametrize(("name", "mebibytes"), [("flash4_attention_backward", 580), ("_scaled_dot_product_cudnn_attention_backward", 706)])
def test_what_attention_takes_for_backward_was_measured(name: str, mebibytes: int) -> None:
    """On an H200, 2 x 8192 tokens, 32 query and 8 key heads of 128, its results included."""
    q, k, v = (torch.empty(2, 8192, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8, 8))
    assert attention_room(name, (q, q, k, v)) + q.nbytes + k.nbytes + v.nbytes == pytest.approx(mebibytes * 2**20, rel=0.01)


@pytest.mark.parametrize("compile", ["none", "step"])
def test_what_attention_takes_for_backward_is_counted(compile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So much that it decides the peak."""
    peaks: list[int] = []
    for more in (0, 1 << 40):
        monkeypatch.setattr(record, "attention_room", lambda name, args, more=more: more * ("attention" in name and "backward" in name))
        peaks.append(memory(planning.record(preset_job("llama_1b", MeshShape(), 1, 1024, layers=2, compile=compile)[0])).peak)
    assert (1 << 40) < peaks[1] < (1 << 40) + peaks[0]


@pytest.mark.parametrize("layers", [3, 8])
def test_offload_by_hand(layers: int) -> None:
    """On the host: 12 bytes a parameter (8 of a norm's) and the inputs of layers but the last; on the device 2 bytes (4 of a norm's)."""
    found = {}
    for kind in ("none", "both"):
        job, _ = preset_job("llama_1b", MeshShape(), 2, 4096, layers=layers, remat="full", compile="step", offload=kind)
        records = planning.record(job)
        found[kind] = (records, memory(records))
    norms, sizes = (2 * layers + 1) * 2048, job.config
    assert not sizes.tied
    layer = 2048 * (2 * sizes.heads + 2 * sizes.kv_heads) * sizes.head_size + 3 * 2048 * sizes.mlp
    products = layers * layer + 2 * sizes.vocab * 2048
    records, planned = found["both"]
    assert records.rest["weights"] == 2 * products + 4 * norms
    assert planned.host == 12 * products + 8 * norms + (layers - 1) * 2 * 4096 * 2048 * 2
    assert found["none"][1].host == 0
    assert planned.peak < found["none"][1].peak


def test_the_command_plans_offload(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "tiny", "--train.seq-len", "64", "--train.global-batch-size", "2", "--remat", "full", "--json", "--offload"]
    found = {}
    for kind in ("none", "both"):
        command.main([*flags, kind])
        found[kind] = json.loads(capsys.readouterr().out)
    assert found["both"]["offload"] == "both" and found["none"]["memory"]["host"] == 0 < found["both"]["memory"]["host"]
    with pytest.raises(UserError, match=r"--offload is 'both' with --mesh\.pipe 2"):
        command.main([*flags, "both", "--mesh", "pipe=2"])


MEASURED = [  # preset, mesh, batch, tokens, layers, GiB and ms of docs/benchmarks.md
    ("llama3_8b", MeshShape(), 2, 8192, 4, 34.08, 268),
    ("llama3_8b", MeshShape(fsdp=4), 2, 8192, 8, None, 468),  # its memory was measured while the head held several tiles
]


@pytest.mark.parametrize("case", MEASURED, ids=lambda c: f"{c[0]}-{c[1].fsdp}-{c[3]}-{c[4]}")
def test_measured_runs(case: tuple[str, MeshShape, int, int, int | None, float | None, float]) -> None:
    name, mesh, micro, seq, layers, gib, ms = case
    job, tokens = preset_job(name, mesh, micro, seq, layers)
    flops = flops_per_token(decoder.specs(job.config), job.config, seq)
    plan = make_plan(recording.record(job), hardware.load("h200"), tokens, flops)
    assert gib is None or plan.memory.peak / 2**30 == pytest.approx(gib, rel=0.05)
    assert plan.step is not None
    assert plan.step * 1e3 == pytest.approx(ms, rel=0.1)


def test_rings_by_hand() -> None:
    h200 = hardware.load("h200")
    inside = traffic(Wire("all_gather", ("fsdp",), 800), MeshShape(fsdp=8), h200)
    assert (inside.sent, inside.link) == (700, "node")
    assert traffic(Wire("all_reduce", ("tensor",), 800), MeshShape(tensor=2), h200).sent == 800
    outside = traffic(Wire("all_gather", ("fsdp",), 10**12), MeshShape(fsdp=16), h200)
    # half of the bytes come from the other node, over its eight devices' ports; all but a sixteenth go over the link inside
    ports, link = 0.5e12 / 8 / (50e9 * h200.efficiency["cluster"]), 10**12 * 15 / 16 / (450e9 * h200.efficiency["node"])
    assert outside.link == "cluster"
    assert outside.seconds == pytest.approx(max(ports, link), rel=0.01)
    apart = traffic(Wire("all_gather", ("fsdp",), 10**9), MeshShape(fsdp=2, tensor=8), h200)
    assert apart.link == "cluster", "devices 0 and 8 lie in two nodes"
    assert apart.seconds == pytest.approx(0.5e9 / (50e9 * h200.efficiency["cluster"]), rel=0.01)


def test_windows_are_counted() -> None:
    assert band(4, 4, -1, 0) == 10
    assert band(4, 4, 1, 0) == 1 + 2 + 2 + 2
    assert band(2, 4, -1, 0) == 3 + 4
    assert band(3, 3, -1, -1) == 9


def test_thousands_of_devices_are_quick() -> None:
    start = time.process_time()
    job, tokens = preset_job("gpt3_175b", MeshShape(replica=16, fsdp=128, tensor=8), 1, 2048)
    plan = make_plan(recording.record(job), hardware.load("h100"), tokens, 1.0)
    assert plan.devices == 16384
    assert time.process_time() - start < 5


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command and give what it prints."""
    command.main(arguments.split())
    return capsys.readouterr().out


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run("--preset llama_1b --mesh tensor=2 --model.layers 4 --json", capsys))
    parts = {k: v for k, v in found["memory"].items() if isinstance(v, int) and k not in ("peak", "capacity", "fits")}
    assert sum(parts.values()) == found["memory"]["peak"]
    shown = ("products", "attention", "other kernels", "communication shown")
    assert found["seconds"]["step"] == pytest.approx(sum(found["seconds"][k] for k in shown))
    text = run("--preset llama_1b --mesh tensor=2 --model.layers 4", capsys)
    assert f"{found['flops']['matmul']:,} FLOP" in text
    assert "InfiniBand" not in text
    assert "DOES NOT FIT" in run("--preset llama3_70b --device a100", capsys)


def test_search_proposes_what_fits_and_says_why_others_lose(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("--preset llama_1b --search --devices 2 --memory 14GiB --global-batch-tokens 16K --model.layers 8 --device a100", capsys)
    assert re.search(r"^1\. mesh \S+, rules \w+, remat \w+", text, re.M)
    peaks = [float(x) for x in re.findall(r"^   ([\d.]+) GiB", text, re.M)]
    assert peaks
    assert max(peaks) <= 14
    steps = [float(x) for x in re.findall(r"([\d.]+) s a step", text)]
    assert steps == sorted(steps)
    assert "too much" in text.partition("why the others lose")[2]
    with pytest.raises(UserError) as error:
        run("--preset llama3_8b --search --devices 2 --memory 10GiB --device a100", capsys)
    assert re.search(r"nothing fits 10\.0 GiB .* Closest: mesh .* [\d.]+ GiB too much", str(error.value))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--preset nosuch", ["unknown preset 'nosuch'"]),
        ("--device h20", ["unknown device 'h20'", "h200"]),
        ("--device none.json", ["cannot read the device table none.json"]),
        ("--mesh tensr=2", ["unknown mesh axis 'tensr'", "tensor"]),
        ("--mesh tensor=3", ["does not divide by tensor=3", "could be 1, 2, 4"]),
        ("--mesh fsdp=3", ["does not divide by", "3"]),
        ("--mesh fsdp=16", ["global-batch-size 8", "16"]),
        ("--remat half", ["remat is 'half'"]),
        ("--search --devices 8 --memory 80Gi", ["--memory is '80Gi'"]),
        ("--search --devices 8 --global-batch-tokens 5000", ["5,000 tokens", "multiple of 8192"]),
        ("--search --devices 0", ["--devices is 0"]),
        ("--node-size 0", ["--node-size is 0"]),
        ("--train.micro-batch-size 0", ["train.micro-batch-size is 0"]),
    ],
)
def test_bad_input_is_one_message(arguments: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        command.main(arguments.split())
    for word in words:
        assert word in str(error.value)


def test_device_tables_say_where_numbers_come_from(tmp_path: Path) -> None:
    for name in hardware.names():
        device = hardware.load(name)
        assert set(device.sources) >= {"peaks", *hardware.SHARES}, name
        assert name == "h200" or not any("measured:" in text for text in device.sources.values()), "only the H200 was measured"
    values = json.loads((hardware.FOLDER / "h200.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**values, "name": "mine"}))
    assert hardware.load(str(tmp_path / "mine.json")).name == "mine"
    values["efficiency"]["matmul"] = 1.5
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"efficiency matmul is 1.5"):
        hardware.load(str(tmp_path / "bad.json"))
    found = hardware.named_like("NVIDIA H200")
    assert found is not None
    assert found.name == "h200"
    assert hardware.named_like("NVIDIA GeForce 256") is None


def test_sizes_are_read() -> None:
    assert plan_search.parse_bytes("80GiB") == 80 * 2**30
    assert plan_search.parse_bytes("1.5GB") == 1_500_000_000
    assert plan_search.parse_count("4M", "x") == 4 * 2**20


@browser.needed
def test_the_page_says_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    found = json.loads(run(f"--preset llama3_8b --mesh fsdp=8 --json --html {page}", capsys))
    shown = browser.text_of(page)
    assert f'id="peak" data-bytes="{found["memory"]["peak"]}"' in shown
    parts = dict(re.findall(r'data-part="([^"]+)" data-bytes="(\d+)"', shown))
    assert {k: int(v) for k, v in parts.items()} == {k: found["memory"][k] for k in parts}
    assert set(parts) == set(PARTS)
    table = re.search(r'<table id="traffic">.*?</table>', shown, re.S)
    assert table
    assert [int(n) for n in re.findall(r'data-bytes="(\d+)"', table[0])] == [row["bytes"] for row in found["collectives"]]
    picture = browser.screenshot(page, tmp_path / "plan.png", 500, 1000)
    assert picture.stat().st_size > 10_000
    assert "http" not in page.read_text()
