"""Stopped in the middle of its data and of a batch-size ramp, a run goes on with the same global batches; other data is told apart."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl.checkpoint.store import Store
from tests.corpora import write
from tests.forks import Forks, Run

STEPS = 9
MODEL = [
    "tiny", "--deterministic", "--precision", "fp64", "--model.layers", "1", "--model.embed", "32", "--model.heads", "4",
    "--model.kv-heads", "2", "--model.mlp", "32", "--model.head-size", "8", "--train.steps", str(STEPS), "--train.eval-samples", "4",
]  # fmt: skip
RAMP = ["--train.seq-len", "32", "--train.global-batch-size", "8", "--batch.rampup", "2", "2", "20", "--data.mask-ends", "--data.apart"]
SAVING = ["--checkpoint.every", "1", "--resume", "auto"]
EXACT = ("step", "loss", "grad_norm", "tokens", "epochs", "eval_loss", "test_loss")


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two corpora of documents of 1 to 60 tokens; the run sees the smaller several times."""
    folder, rng = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    for name, count in (("a", 8), ("b", 60)):
        write(folder / name, [rng.integers(1, 200, rng.integers(1, 60)).tolist() for _ in range(count)])
    return ["--data", f"0.3 {folder / 'a'} 0.7 {folder / 'b'}", "--data.split", "8,1,1"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: m[k] for k in EXACT if k in m} for m in lines]


def run(forks: Forks, arguments: list[str], out: Path, ranks: int = 1, program: str = "pretrain", code: int = 0) -> Run:
    """Run to the end."""
    started = forks.start([*arguments, "--out", str(out)], ranks, program)
    assert forks.wait(started) == [code] * ranks, started.text()
    return started


def stop(forks: Forks, arguments: list[str], out: Path, step: int, number: int, ranks: int = 1, program: str = "pretrain") -> int:
    """Run until a step is saved and send a signal; gives the step that the next run goes on from, which is not the last."""
    started = forks.start([*arguments, *SAVING, "--out", str(out)], ranks, program)
    end, store = time.monotonic() + 60, Store(out / "checkpoints")
    while (store.latest() or -1) < step and time.monotonic() < end:
        time.sleep(0.002)
    started.signal(number)
    forks.wait(started)
    at = store.latest()
    assert at is not None and step <= at < STEPS, started.text()
    return at


@pytest.mark.parametrize("order", [pytest.param("stateless", marks=pytest.mark.slow), "megatron"])
def test_killed_in_the_middle_of_a_ramp_the_batches_are_the_same(order: str, forks: Forks, blend: list[str], tmp_path: Path) -> None:
    """kill -9, then a signal that saves, then the rest: metrics bitwise those of a run that never stopped."""
    arguments = [*MODEL, *RAMP, *blend, "--data.order", order]
    run(forks, arguments, tmp_path / "straight")
    want = metrics(tmp_path / "straight")
    sizes = [m["tokens"] for m in want]
    assert len({round(n / 32) for n in sizes}) > 3 and max(want[-1]["epochs"].values()) > 1.5, "a ramp, and a corpus seen more than once"
    first = stop(forks, arguments, tmp_path / "run", 2, signal.SIGKILL)
    second = stop(forks, arguments, tmp_path / "run", first + 1, signal.SIGTERM) if first < STEPS - 3 else first
    said = run(forks, [*arguments, *SAVING], tmp_path / "run").text()
    assert f"resumed after step {second}" in said
    assert metrics(tmp_path / "run") == want


def test_on_other_meshes_and_micro_batches_the_batches_are_the_same(forks: Forks, blend: list[str], tmp_path: Path) -> None:
    """One process, then two data ranks with another micro-batch and no threads, then two context ranks: float64 to 1e-9."""
    arguments, out = [*MODEL, *RAMP, *blend], tmp_path / "run"
    run(forks, arguments, tmp_path / "straight")
    first = stop(forks, arguments, out, 1, signal.SIGTERM)
    data = ["--mesh.fsdp", "2", "--train.micro-batch-size", "1", "--batch.workers", "0"]
    second = stop(forks, [*arguments, *data], out, first + 1, signal.SIGTERM, 2)
    run(forks, [*arguments, *SAVING, "--mesh.context", "2", "--rules", "ring", "--batch.workers", "3"], out, 2)
    got, want = metrics(out), metrics(tmp_path / "straight")
    assert len(got) == len(want) == STEPS and first < second < STEPS
    for a, b in zip(got, want, strict=True):
        assert a["tokens"] == b["tokens"] and a["epochs"] == b["epochs"]
        assert all(abs(a[k] - b[k]) <= 1e-9 * abs(b[k]) for k in ("loss", "grad_norm", "eval_loss", "test_loss") if k in b), (a, b)


def test_other_data_is_told_apart(forks: Forks, blend: list[str], tmp_path: Path) -> None:
    """A resumed run must read what it read: moved files are the same data, changed ones are not, nor is another reading of them."""
    arguments, out = [*MODEL, "--train.seq-len", "32", "--train.steps", "2"], tmp_path / "run"
    run(forks, [*arguments, *blend], out)
    again = [*arguments, "--train.steps", "3", "--resume", "auto"]
    _, a, _, b = blend[1].split()
    (tmp_path / "moved").mkdir()
    for path in (a, b):
        for suffix in (".bin", ".idx"):
            (tmp_path / "moved" / (Path(path).name + suffix)).write_bytes(Path(path + suffix).read_bytes())
    a, b = (str(tmp_path / "moved" / Path(p).name) for p in (a, b))
    other = write(tmp_path / "other" / "b", [[7] * 30] * 60) if (tmp_path / "other").mkdir() is None else ""
    refused = {
        "data (b) is 0.7 of": ["--data", f"0.3 {a} 0.7 {other}", *blend[2:]],
        "data (a) is 0.4 of": ["--data", f"0.4 {a} 0.6 {b}", *blend[2:]],
        "data.apart is True": [*blend, "--data.apart"],
        "data.split is 7,2,1": [*blend[:2], "--data.split", "7,2,1"],
        "data.order is megatron": [*blend, "--data.order", "megatron"],
    }
    for says, data in refused.items():
        said = run(forks, [*again, *data], out, code=2).text()
        assert says in said and "a resumed run must keep it. Nothing was changed" in said, said
    run(forks, [*again, "--data", f"0.3 {a} 0.7 {b}", *blend[2:]], out)
    assert [m["step"] for m in metrics(out)] == [1, 2, 3]


def test_another_meaning_of_the_weights_is_told_apart(forks: Forks, tmp_path: Path) -> None:
    """The arrays would fit: only what is done with them is another; or they would not, and the setting says it better than shapes."""
    arguments = [*MODEL, "--train.seq-len", "32", "--train.steps", "1", "--lora.rank", "2"]
    run(forks, arguments, tmp_path / "run")
    again = [*arguments, "--train.steps", "2", "--resume", "auto"]
    refused = {
        "model.activation is geglu": ["--model.activation", "geglu"],
        "model.window is 8": ["--model.window", "8"],
        "model.layers is 2": ["--model.layers", "2"],
        "lora.alpha is 99.0": ["--lora.alpha", "99"],
        "lora.rank is 0": ["--lora.rank", "0"],
        "optim.name is sgd": ["--optim.name", "sgd"],
    }
    for says, flags in refused.items():
        said = run(forks, [*again, *flags], tmp_path / "run", code=2).text()
        assert says in said and "a resumed run must keep it. Nothing was changed" in said, said
    run(forks, [*again, "--lora.dropout", "0.5", "--optim.lr", "1e-4", "--model.z-loss", "1e-3"], tmp_path / "run")


@pytest.mark.parametrize(("before", "after"), [("fp16", "bf16"), pytest.param("bf16", "fp16", marks=pytest.mark.slow)])
def test_precision_may_change_where_losses_are_scaled_in_one_alone(before: str, after: str, forks: Forks, tmp_path: Path) -> None:
    arguments = [*MODEL, "--train.seq-len", "32", "--optim.schedule", "constant"]
    run(forks, [*arguments, "--train.steps", "3", "--precision", before], tmp_path / "straight")
    run(forks, [*arguments, "--train.steps", "1", "--precision", before], tmp_path / "run")
    said = run(forks, [*arguments, "--train.steps", "3", "--precision", after, "--resume", "must"], tmp_path / "run").text()
    assert "resumed after step 1" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["loss_scale" in m for m in lines] == [before == "fp16"] + 2 * [after == "fp16"]
    for a, b in zip(lines, metrics(tmp_path / "straight"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_megatrons_order_of_a_longer_run_is_told_apart(forks: Forks, blend: list[str], tmp_path: Path) -> None:
    """Where a corpus comes more than once, Megatron-LM's order follows the run's length: going on with it would shuffle anew unseen."""
    arguments = [*MODEL, "--train.seq-len", "32", *blend, "--data.order", "megatron", "--train.eval-samples", "1"]
    run(forks, [*arguments, "--train.steps", "4"], tmp_path / "run")
    said = run(forks, [*arguments, "--train.steps", "40", "--resume", "auto"], tmp_path / "run", code=2).text()
    assert "it follows train.steps where a corpus comes more than once" in said


# ---------------------------------------------------------------- chats


def chats(path: Path, count: int, seed: int = 0) -> Path:
    """Write small questions and answers."""
    rng = random.Random(seed)
    rows = [{"question": "q" * rng.randrange(1, 40), "answer": f"answer {i} " * rng.randrange(1, 6)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("packing", ["best-fit", pytest.param("pad", marks=pytest.mark.slow)])
def test_a_killed_fine_tune_goes_on(packing: str, forks: Forks, tmp_path: Path) -> None:
    """kill -9 and resume, bitwise; best-fit also on another mesh and micro-batch, to 1e-9."""
    rows = chats(tmp_path / "chats.jsonl", 120)
    arguments = [*MODEL, "--data", str(rows), "--train.seq-len", "128", "--train.global-batch-size", "4", "--packing", packing]
    run(forks, arguments, tmp_path / "straight", program="finetune")
    want = metrics(tmp_path / "straight")
    at = stop(forks, arguments, tmp_path / "run", 3, signal.SIGKILL, program="finetune")
    said = run(forks, [*arguments, *SAVING], tmp_path / "run", program="finetune").text()
    assert f"resumed after step {at}" in said and metrics(tmp_path / "run") == want
    if packing == "pad":
        return
    stop(forks, arguments, tmp_path / "meshed", 3, signal.SIGTERM, program="finetune")
    run(forks, [*arguments, *SAVING, "--mesh.tensor", "2", "--train.micro-batch-size", "2"], tmp_path / "meshed", 2, "finetune")
    for a, b in zip(metrics(tmp_path / "meshed"), want, strict=True):
        assert a["tokens"] == b["tokens"]
        assert all(abs(a[k] - b[k]) <= 1e-9 * abs(b[k]) for k in ("loss", "grad_norm", "eval_loss") if k in b), (a, b)


def test_other_chats_are_told_apart(forks: Forks, tmp_path: Path) -> None:
    rows, others = chats(tmp_path / "chats.jsonl", 60), chats(tmp_path / "others.jsonl", 60, 1)
    arguments = [*MODEL, "--train.seq-len", "128", "--train.steps", "2"]
    run(forks, [*arguments, "--data", str(rows)], tmp_path / "run", program="finetune")
    refused = {
        "--data is rows": ["--data", str(others)],
        "--role-weights is assistant=1,user=0.5": ["--data", str(rows), "--role-weights", "assistant=1,user=0.5"],
        "--packing is pad": ["--data", str(rows), "--packing", "pad"],
        "--held-out is 0.2": ["--data", str(rows), "--held-out", "0.2"],
        "the tokenizer is bytes": ["--data", str(rows), "--tokenizer.special", "<x>", "--model.vocab", "260"],
    }
    for says, flags in refused.items():
        said = run(forks, [*arguments, *flags, "--resume", "auto"], tmp_path / "run", program="finetune", code=2).text()
        assert says in said and "a resumed run must keep it. Nothing was changed" in said, said
