"""Pipelines from the command line: settings that cannot be, checkpoints across meshes, measured times, and a stage that dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import pipelining, pretrain
from mtl.errors import UserError
from mtl.precision import PRECISIONS

ROOT = Path(__file__).parent.parent
SMALL = (
    "--train.global-batch-size 16 --train.seq-len 32 --model.layers 4 --model.embed 32 --model.mlp 48 --model.head-size 8 --precision fp64"
)


def settle(flags: str, world: int) -> tuple[pretrain.Experiment, object]:
    """Read, settle and check settings as a run does, without one."""
    _, setup = pretrain.read_settings(["tiny", *SMALL.split(), *flags.split()])
    rules, shape = pretrain.choose_layout(setup, world)
    setup = pretrain.with_micro_batch(setup, rules, shape)
    pretrain.check(setup, rules, shape, PRECISIONS["fp64"], torch.device("cpu"))
    return setup, pipelining.plan(setup, shape)


REFUSED = [
    ("--pipeline.schedule 1f1b", 1, "pipeline.schedule is 1f1b, but there is no pipeline: set --mesh.pipe"),
    ("--mesh.pipe 4 --pipeline.microbatches 2", 4, "too few for schedule 1f1b over 4 pipeline devices"),
    ("--mesh.pipe 4 --train.global-batch-size 3 --pipeline.schedule zb_v", 4, "too few for schedule zb_v"),
    ("--mesh.pipe 4 --pipeline.microbatches 5", 4, "do not divide into as many micro-batches"),
    ("--mesh.pipe 2 --pipeline.microbatches 4 --train.micro-batch-size 3", 2, "Leave one of the three out"),
    (
        "--mesh.pipe 4 --pipeline.schedule interleaved --pipeline.virtual 2",
        4,
        "model.layers is 4, which do not split over",
    ),
    ("--mesh.pipe 2 --pipeline.schedule zb_v --pipeline.virtual 4", 2, "pipeline.virtual is 4, but schedule zb_v has 2"),
    ("--mesh.pipe 2 --pipeline.layers-per-stage 1 2", 2, "pipeline.layers-per-stage is 1 2: expected 2 numbers"),
    ("--mesh.pipe 2 --pipeline.schedule 1f1", 2, "Did you mean '1f1b'"),
    ("--mesh.pipe 2 --pipeline.schedule nowhere/table.txt", 2, "there is no such file"),
]


@pytest.mark.parametrize(("flags", "world", "message"), REFUSED)
def test_settings_that_cannot_be_are_refused(flags: str, world: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        settle(flags, world)
    assert message in str(caught.value)


def test_a_deadlocking_file_is_refused_with_its_action(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_text("0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1\n")
    with pytest.raises(UserError, match="deadlocks: device 0 at 0B0"):
        settle(f"--mesh.pipe 2 --pipeline.schedule {path}", 2)


def test_open_settings_are_settled() -> None:
    setup, plan = settle("--mesh.pipe 2", 2)
    assert (setup.pipeline.schedule, setup.pipeline.microbatches, setup.train.micro_batch_size) == ("1f1b", 8, 2)
    assert isinstance(plan, pipelining.Pipeline) and sum(len(part) for part in plan.layers) == 4
    setup, _ = settle("--mesh.pipe 2 --pipeline.microbatches 4", 2)
    assert setup.train.micro_batch_size == 4
    assert pipelining.described(setup, plan)["microbatches"] == 4


def torchrun(flags: list[str], ranks: int) -> subprocess.Popen[str]:
    """Start a run on several processes."""
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(20000 + os.getpid() % 20000),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*program, "experiments/pretrain.py", "tiny", *SMALL.split(), *flags]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def children(parent: int) -> list[int]:
    """List a process's children, by rank."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                words = dict(w.split("=", 1) for w in (entry / "environ").read_text().split("\0") if "=" in w)
                found.append((int(words["RANK"]), int(entry.name)))
        except (OSError, KeyError, ValueError):
            continue
    return [pid for _, pid in sorted(found)]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_stage_that_dies_ends_all_with_one_message(tmp_path: Path) -> None:
    run = torchrun(["--train.steps", "5000", "--mesh.pipe", "2", "--out", str(tmp_path / "run")], 2)
    try:
        log, waited = tmp_path / "run/metrics.jsonl", time.monotonic()
        while not (log.exists() and log.read_text().count("\n") > 1):
            assert run.poll() is None and time.monotonic() - waited < 200
            time.sleep(0.2)
        workers = children(run.pid)
        os.kill(workers[1], signal.SIGKILL)
        begun = time.monotonic()
        _, said = run.communicate(timeout=60)
        assert time.monotonic() - begun < 30 and run.returncode != 0
        assert said.count("\nerror") == 1 and "is gone" in said and "error on rank" not in said, said
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_goes_on_with_another_pipeline(tmp_path: Path) -> None:
    """Steps through an uneven V, saved; the last two done again on one device: the numbers of a run on one device alone."""

    def run(name: str, ranks: int, flags: str) -> list[dict[str, float]]:
        out, err = (going := torchrun([*flags.split(), "--train.steps", "4", "--out", str(tmp_path / name)], ranks)).communicate(
            timeout=300
        )
        assert going.returncode == 0, out + err
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    first = run(
        "two", 2, "--checkpoint.every 2 --mesh.pipe 2 --pipeline.schedule zb_v --model.layers 5 --pipeline.layers-per-stage 1 2 1 1"
    )
    assert len(first) == 4
    times = json.loads((tmp_path / "two/pipeline.jsonl").read_text().splitlines()[-1])
    assert times["step"] == 4 and len(times["rows"]) == 2 and all(end >= start for row in times["rows"] for _, start, end in row)
    want = run("one_of_five", 1, "--model.layers 5")
    newest = max((tmp_path / "two/checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    shutil.rmtree(newest)
    again = run("two", 1, "--checkpoint.every 2 --model.layers 5 --resume must")
    for found in (first, again):
        for a, b in zip(found, want, strict=True):
            assert all(abs(a[key] - b[key]) <= 1e-9 * abs(b[key]) for key in ("loss", "grad_norm", "tokens"))
