"""The command line as a user has it: runs alone and under torchrun, run folder, determinism, and what bad input gets."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import pretrain
from experiments.presets import PRESETS
from mtl.data.batches import BatchShape, batch_at
from mtl.data.samples import as_sample
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.train.evaluate import make_evaluate
from tests.forks import Forks

ROOT = Path(__file__).parent.parent
SHORT = ["--train.steps", "3", "--train.global-batch-size", "8", "--train.seq-len", "64"]
MODEL = ["--model.layers", "2", "--model.embed", "32", "--model.mlp", "48", "--model.head-size", "8"]
FIELDS = {
    "step", "loss", "grad_norm", "learning_rate", "tokens", "step_time", "tokens_per_second_per_device", "mfu", "mfu_full_attention",
    "peak_memory_gib", "epochs", "data_wait",
}  # fmt: skip


def start(arguments: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run pretrain.py as a user does; `Forks.complete` does without the slow start."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
    if ranks > 1:
        program += ["--master-port", str(20000 + os.getpid() % 20000)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [*program, "experiments/pretrain.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_torchrun_gives_one_process_numbers(tmp_path: Path) -> None:
    alone = start(["tiny", "--precision", "fp64", *SHORT, *MODEL, "--out", str(tmp_path / "one")])
    assert alone.returncode == 0, alone.stderr
    assert "run folder" in alone.stdout and "sample:" in alone.stdout and "next:" in alone.stdout
    want = metrics(tmp_path / "one")
    assert [m["step"] for m in want] == [1, 2, 3] and set(want[0]) == FIELDS
    assert {"eval_loss", "eval_bits_per_byte"} <= set(want[-1])
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert config["train"]["steps"] == 3 and config["versions"]["torch"] and config["resolved"]["rules"] == "single"
    both = ["--rules", "fsdp_tensor", "--mesh.fsdp", "2", "--mesh.tensor", "-1", "--transport", "engine"]
    meshed = start(["tiny", "--precision", "fp64", *SHORT, *MODEL, *both, "--out", str(tmp_path / "two")], ranks=2)
    assert meshed.returncode == 0, meshed.stderr
    resolved = [json.loads((tmp_path / name / "config.json").read_text())["resolved"]["transport"] for name in ("one", "two")]
    assert resolved == ["collectives", "engine"]
    for a, b in zip(metrics(tmp_path / "two"), want, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "tokens", "eval_loss"):
            if name in b:
                assert abs(a[name] - b[name]) <= 1e-9 * abs(b[name]), name


def test_deterministic_runs_are_bitwise_equal_and_a_folder_is_never_reused(forks: Forks, tmp_path: Path) -> None:
    arguments = [*SHORT, *MODEL, "--deterministic", "--out"]
    runs = [start([*arguments, str(tmp_path / "a"), "--log.wandb"]), forks.complete([*arguments, str(tmp_path / "b")])]
    assert [r.returncode for r in runs] == [0, 0], runs[0].stderr
    kept = [[{k: m[k] for k in m if k in ("loss", "grad_norm", "eval_loss")} for m in metrics(tmp_path / name)] for name in "ab"]
    assert kept[0] == kept[1]
    assert list((tmp_path / "a/wandb").glob("offline-run-*")), "wandb works offline"
    before = (tmp_path / "a/metrics.jsonl").read_bytes()
    again = forks.complete([*SHORT, *MODEL, "--out", str(tmp_path / "a")])
    assert again.returncode == 2 and "holds another run" in again.stderr
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == before


def test_the_next_command_names_the_run_s_own_preset(forks: Forks, tmp_path: Path) -> None:
    small = ["--model.heads", "4", "--model.kv-heads", "2", "--model.vocab", "300"]
    done = forks.complete(["llama_1b", *SHORT, *MODEL, *small, "--train.eval-samples", "2", "--out", str(tmp_path / "run")])
    assert done.returncode == 0 and "experiments/pretrain.py llama_1b --mesh.tensor 2" in done.stdout, done.stdout + done.stderr


BAD = {
    "preset": (["tinny"], "Did you mean 'tiny'"),
    "flag": (["tiny", "--train.stps", "3"], "train.stps"),
    "batch": (["tiny", "--train.global-batch-size", "10", "--train.micro-batch-size", "4"], "global-batch-size 10 does not divide"),
    "positions": (["gpt2_124m", "--train.seq-len", "2048"], "longer than the model's 1024 learned positions"),
    "rules": (["tiny", "--rules", "fdsp"], "Did you mean 'fsdp'"),
    "world": (["tiny", "--mesh.tensor", "2"], "needs 2 devices, but 1 process runs"),
    "impl": (["tiny", "--model.attention-impl", "cudnn"], "needs a CUDA device, not cpu"),
    "remat": (["tiny", "--remat", "some"], "expected none, gather, selective, mlp, mlp:N"),
    "heads": (["tiny", "--model.heads", "6", "--model.kv-heads", "4"], "--model.heads 6 does not divide by --model.kv-heads 4"),
    "clip": (["tiny", "--optim.clip", "-1"], "--optim.clip is -1.0"),
    "micro": (["tiny", "--train.micro-batch-size", "0"], "micro-batch-size is 0"),
    "warmup": (["tiny", "--optim.warmup-steps", "-1"], "--optim.warmup-steps -1 must not be negative"),
    "steps": (["tiny", "--train.steps", "-1"], "--train.steps is -1: it must be at least 0"),
    "samples": (["tiny", "--train.eval-samples", "0"], "--train.eval-samples is 0: it must be at least 1"),
    "every": (["tiny", "--remat", "every:²"], "expected none, gather, selective, mlp, mlp:N"),
    "rope": (["tiny", "--model.rope-theta", "-1"], "--model.rope-theta is -1.0: it must be a number above 0"),
    "scale": (["tiny", "--model.attention-scale", "nan"], "--model.attention-scale is nan"),
    "eps": (["tiny", "--model.norm-eps", "nan"], "--model.norm-eps is nan"),
    "loss_impl": (["tiny", "--model.loss-impl", "slow"], "invalid choice 'slow'"),
    "nan": (["tiny", *SHORT, *MODEL, "--optim.lr", "1e200", "--optim.warmup-steps", "0"], "step 2: the loss of micro-batch 0 is"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_message(name: str, forks: Forks, tmp_path: Path) -> None:
    arguments, message = BAD[name]
    run = start if name == "flag" else forks.complete
    done = run([*arguments, "--out", str(tmp_path / "run")])
    assert done.returncode == 2, done.stdout + done.stderr
    assert name == "nan" or not (tmp_path / "run").exists(), "nothing is left behind"
    said = " ".join((done.stdout + done.stderr).replace("│", "").split())  # tyro's frame breaks lines
    assert message in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        ("forks", ["--mesh.tensor", "2", "--model.heads", "3", "--model.kv-heads", "1"], "heads of size 3 does not divide by tensor=2"),
        ("forks", ["--optim.lr", "1e200", "--optim.warmup-steps", "0"], "step 2: the loss of micro-batch"),
        pytest.param(
            "torchrun", ["--optim.lr", "1e200", "--optim.warmup-steps", "0"], "step 2: the loss of micro-batch", marks=pytest.mark.slow
        ),
        ("forks", ["--mesh.fsdp", "3"], "needs 3 devices, but 2 processes run"),
    ],
)
def test_bad_input_ends_every_rank(launcher: str, flags: list[str], message: str, forks: Forks, tmp_path: Path) -> None:
    begun = time.monotonic()
    run = start if launcher == "torchrun" else forks.complete
    done = run(["tiny", *SHORT, *MODEL, *flags, "--out", str(tmp_path / "run")], ranks=2)
    assert done.returncode != 0 and time.monotonic() - begun < 90
    assert done.stderr.count(message) == 1, done.stderr


def test_evaluation_has_no_dropout_and_counts_each_sample_once(one: Any) -> None:
    """The rate makes no difference, and samples beyond the number asked for count for nothing."""
    wet = dataclasses.replace(PRESETS["tiny"].model, layers=1, embed=16, heads=2, kv_heads=1, head_size=8, mlp=16, dropout_embed=0.5)
    dry, precision = decoder.for_evaluation(wet), PRECISIONS["fp64"]
    par = one(**decoder.sizes(dry), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), 16), batch=4)
    params = init(decoder.specs(dry), par.rules, par.mesh, 0, torch.float64)

    def samples(index: int, seq_len: int) -> Any:
        return as_sample((torch.arange(seq_len + 1).numpy() * 7 + index) % 256)

    def loss(model: decoder.Config, rows: int, stop: int) -> float:
        shape = BatchShape(rows, rows, 16)
        count = -(-stop // rows)
        batches = [batch_at(par, samples, i * rows, shape, torch.float64, stop) for i in range(count)]
        return make_evaluate(decoder, model, par, precision)(params, batches)

    assert loss(wet, 4, 4) == loss(dry, 4, 4)
    assert math.isclose(loss(dry, 4, 6), loss(dry, 2, 6), rel_tol=1e-12)


def test_open_micro_batch_is_the_largest_that_divides() -> None:
    single = pretrain.choose_layout(PRESETS["tiny"], 1)
    for batch, want in ((8, 8), (24, 8), (7, 7), (11, 1), (9, 3)):
        train = dataclasses.replace(PRESETS["tiny"].train, global_batch_size=batch)
        settled = pretrain.with_micro_batch(dataclasses.replace(PRESETS["tiny"], train=train), *single)
        assert settled.train.micro_batch_size == want
