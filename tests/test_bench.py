"""The benchmarks' own arithmetic, and that they run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench import against_torchtitan, ops, step
from mtl.errors import UserError
from mtl.inspect import hardware
from tests.test_pretrain import ROOT

LOG = """
[titan] INFO - \x1b[31mstep:  1  \x1b[32mloss: 12.2687  \x1b[33mmemory: 97.07GiB(69.4%)  \x1b[34mtps: 512  \x1b[36mtflops: 29.68
[titan] INFO - \x1b[31mstep: 20  \x1b[32mloss:  7.1  \x1b[38mgrad_norm:  2.1  \x1b[33mmemory: 114.61GiB(81.9%)  \x1b[34mtps: 10,355
"""


def test_torchtitans_log_is_read() -> None:
    assert against_torchtitan.read(LOG) == [
        {"step": 1, "loss": 12.2687, "memory": 97.07, "tokens": 512.0},
        {"step": 20, "loss": 7.1, "memory": 114.61, "tokens": 10355.0},
    ]


def test_torchtitans_settings_follow_the_flags(tmp_path: Path) -> None:
    plain = against_torchtitan.settings(against_torchtitan.Bench(batch=3, remat="full", tensor=2), tmp_path)
    assert "local_batch_size = 3" in plain and 'mode = "full"' in plain and "tensor_parallel_degree = 2" in plain and "float8" not in plain
    assert "[quantize.linear.float8]" in against_torchtitan.settings(against_torchtitan.Bench(precision="fp8"), tmp_path)


def test_a_step_must_be_left_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", "--steps", "3"])
    with pytest.raises(UserError, match="--warmup 3 of --steps 3 leaves no step to time"):
        step.main()


@pytest.mark.parametrize(
    ("bench", "flags", "says"),
    [
        (step, "--layers 0", "--layers is 0: it must be at least 1"),
        (step, "--seq-len -5", "--seq-len is -5"),
        (step, "--accumulate 0", "--accumulate is 0"),
        (step, "--profile -1", "--profile is -1: it must be at least 0"),
        (step, "--lr nan", "--lr is nan"),
        (step, "--json none/x.json", "--json none/x.json cannot be written"),
        (ops, "--lengths 64 0", "--lengths is 0"),
        (ops, "--heads 5 --kv-heads 2", "--heads 5 does not divide by --kv-heads 2"),
        (ops, "--head-size 7", "--head-size is 7: rotary positions need an even head size"),
        (ops, "--rounds 0", "--rounds is 0"),
        (ops, "--optimized 0", "--optimized is 0.0"),
    ],
)
def test_flags_that_cannot_be_timed_are_refused_before(bench: Any, flags: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    with pytest.raises(UserError, match=says):
        bench.main()


def test_packed_attention_counts_its_own_pairs() -> None:
    """Operations are those of the pairs that see each other; one document a row gives the plain causal count."""
    bench = ops.Bench(heads=2, kv_heads=1, head_size=8)
    whole = ops.attention_case(bench, torch.device("cpu"), 64, None)
    rows = 8
    assert whole.flops[0] == rows * 4 * 2 * 8 * 64 * 65 / 2 and whole.flops[1] == 3.5 * whole.flops[0]
    ends = ops.unequal(64, 4, rows, torch.device("cpu"))
    packed = ops.attention_case(bench, torch.device("cpu"), 64, 4)
    sizes = [b - a for row in ends.tolist() for a, b in zip([0, *row], row, strict=False)]
    assert sum(sizes) == rows * 64 and min(sizes) > 0 and packed.flops[0] == 4 * 2 * 8 * sum(n * (n + 1) / 2 for n in sizes)


def test_a_calibrated_table_is_one_that_plans_take(tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    flags = "--tokens 64 --width 64 --megabytes 1 --seconds 0.01"
    command = [sys.executable, "experiments/bench/calibrate.py", *flags.split(), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    mine, base = hardware.load(str(out)), hardware.load("h200")
    for name in ("matmul", "memory", "attention_forward", "attention_backward"):
        assert mine.efficiency[name] != base.efficiency[name] and mine.sources[name].startswith("measured"), name
        assert name in done.stdout
    assert mine.launch != base.launch and mine.name == "mine" and mine.peak_flops == base.peak_flops
    assert mine.efficiency["node"] == base.efficiency["node"] and mine.sources["node"] == base.sources["node"]  # one process has no link


@pytest.mark.slow
def test_every_op_is_timed(tmp_path: Path) -> None:
    flags = "--lengths 64 --heads 4 --kv-heads 2 --head-size 8 --tokens 64 --embed 32 --mlp 64 --vocab 128 --optimized 0.0005 --rounds 2"
    command = [sys.executable, "experiments/bench/ops.py", *flags.split(), "--json", str(tmp_path / "ops.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in (tmp_path / "ops.json").read_text().splitlines()]
    assert {r["op"] for r in rows} == {"attention", "packed 8", "norm", "rotary", "swiglu", "head", "optimizer"}
    assert [r for r in rows if r["error"]] == [] and all(r["both_ms"] > 0 for r in rows), done.stdout
    for op in ("attention", "norm", "head", "optimizer"):
        group = [r for r in rows if r["op"] == op]
        assert len(group) >= 3 and max(r["of_best"] for r in group) == 1.0 and sum(r["auto"] for r in group) == 1


@pytest.mark.slow
def test_rounding_is_timed_and_exact(tmp_path: Path) -> None:
    flags = f"--rows 64 --columns 160 --embed 32 --rounds 2 --json {tmp_path / 'rounding.json'}"
    subprocess.run([sys.executable, "experiments/bench/rounding.py", *flags.split()], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (tmp_path / "rounding.json").read_text().splitlines()]
    assert [r["note"] for r in rows if r["what"].startswith("rounded")] == ["exact"] * 3
    assert len(rows) == 3 + 2 + 2 * 3 and all(r["us"] > 0 for r in rows)
