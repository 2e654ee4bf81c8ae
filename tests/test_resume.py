"""A run that is stopped, killed or damaged goes on, and its metrics are bitwise those of a run that never stopped."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mtl import checkpoint
from mtl.checkpoint.store import Store
from mtl.checkpoint.verify import find_damage
from tests.forks import Forks, Run

ROOT = Path(__file__).parent.parent
STEPS = 8
TINY = [
    "tiny", "--deterministic", "--train.steps", str(STEPS), "--train.global-batch-size", "4", "--train.seq-len", "32", "--train.eval-every",
    "3", "--train.eval-samples", "8", "--model.layers", "1", "--model.embed", "32", "--model.heads", "4", "--model.kv-heads", "2",
    "--model.mlp", "32", "--model.head-size", "8",
]  # fmt: skip
SAVING = ["--checkpoint.every", "1", "--resume", "auto"]
EXACT = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss", "eval_bits_per_byte")
MESHES = {1: [], 2: ["--mesh.fsdp", "2"], 4: ["--mesh.fsdp", "2", "--mesh.tensor", "2"]}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: m[k] for k in EXACT if k in m} for m in lines]


@pytest.fixture(scope="module")
def straight(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """The metrics of runs that never stop, by number of processes."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("straight") / "run"
        run = forks.start([*TINY, *MESHES[ranks], "--out", str(out)], ranks)
        assert forks.wait(run) == [0] * ranks, run.text()
        found[ranks] = metrics(out)
        assert [m["step"] for m in found[ranks]] == list(range(1, STEPS + 1))
    return found


def finish(forks: Forks, out: Path, want: list[dict[str, Any]], ranks: int = 1) -> None:
    """Check what is left, resume to the end, and compare every step."""
    store = Store(out / "checkpoints")
    for step in store.steps():
        assert not find_damage(store.path(step)).problems, step
    run = forks.start([*TINY, *SAVING, *MESHES[ranks], "--out", str(out)], ranks)
    assert forks.wait(run) == [0] * ranks, run.text()
    assert metrics(out) == want
    assert store.latest() == STEPS and not list(store.folder.glob("*tmp"))


def until(run: Run, out: Path, step: int, seconds: float = 60) -> None:
    """Wait until a step is committed."""
    end = time.monotonic() + seconds
    while (Store(out / "checkpoints").latest() or -1) < step and time.monotonic() < end:
        time.sleep(0.01)


def test_a_resumed_run_goes_on_bitwise(forks: Forks, straight: Any, tmp_path: Path) -> None:
    """Stopped after 3 of 8 steps by its settings, then resumed with the same and another mesh."""
    out = tmp_path / "run"
    first = forks.start([*TINY, "--checkpoint.every", "2", "--optim.schedule", "constant", "--train.steps", "3", "--out", str(out)])
    assert forks.wait(first) == [0], first.text()
    assert Store(out / "checkpoints").steps() == [2, 3]
    found = checkpoint.inspect(out / "checkpoints/3")
    assert found.host["step"] == 3 and found.config["train"]["seq_len"] == 32 and found.host["data"] == {"samples": 12}
    again = forks.start([*TINY, "--checkpoint.every", "2", "--out", str(out)])
    assert forks.wait(again) == [2] and "holds another run" in again.text()
    constant = ["--optim.schedule", "constant"]
    want = forks.start([*TINY, *constant, "--out", str(tmp_path / "straight")])
    assert forks.wait(want) == [0]
    more = forks.start([*TINY, *constant, "--resume", "must", "--out", str(out)])
    assert forks.wait(more) == [0], more.text()
    assert "resumed after step 3" in more.text()
    lines = metrics(out)
    assert [m for m in lines if m["step"] > 3] == [m for m in metrics(tmp_path / "straight") if m["step"] > 3]
    config = json.loads((out / "config.json").read_text())
    assert [r["step"] for r in config["resumed"]] == [3] and config["run_id"] == found.host["run_id"]
    other = forks.start([*TINY, *constant, "--resume", "auto", "--train.seed", "1", "--out", str(out)])
    assert forks.wait(other) == [2] and "--train.seed is 1" in other.text()
    before = (out / "metrics.jsonl").read_bytes(), (out / "config.json").read_bytes()
    fewer = forks.start([*TINY, *constant, "--resume", "auto", "--train.steps", "5", "--out", str(out)])
    assert forks.wait(fewer) == [2] and "--train.steps is 5" in fewer.text() and f"checkpoints/{STEPS} holds step {STEPS}" in fewer.text()
    assert before == ((out / "metrics.jsonl").read_bytes(), (out / "config.json").read_bytes())
    same = forks.start([*TINY, *constant, "--resume", "auto", "--out", str(out)])
    assert forks.wait(same) == [0] and f"resumed after step {STEPS}" in same.text() and "all of --train.steps are done" in same.text()
    assert metrics(out) == lines
    none = forks.start([*TINY, "--resume", "must", "--out", str(tmp_path / "none")])
    assert forks.wait(none) == [2] and "has no finished checkpoint" in none.text()


def test_another_mesh_goes_on_with_the_same_numbers(forks: Forks, tmp_path: Path) -> None:
    """In float64: 4 steps on one process, 2 on four (fsdp x tensor), 2 on two."""
    exact = [*TINY, "--precision", "fp64", "--checkpoint.every", "2"]
    straight = forks.start([*exact, "--out", str(tmp_path / "straight")])
    assert forks.wait(straight) == [0], straight.text()
    out = tmp_path / "run"
    for steps, ranks in ((4, 1), (6, 4), (8, 2)):
        resume = ["--resume", "auto", "--train.steps", "8", "--out", str(out)]
        run = forks.start([*exact, *MESHES[ranks], *resume], ranks)
        if steps < STEPS:
            until(run, out, steps)
            run.signal(signal.SIGKILL)
            forks.wait(run)
            for late in [s for s in Store(out / "checkpoints").steps() if s > steps]:
                checkpoint_folder = out / f"checkpoints/{late}"
                checkpoint_folder.rename(tmp_path / f"late{ranks}_{late}")
        else:
            assert forks.wait(run) == [0] * ranks, run.text()
    for got, want in zip(metrics(out), metrics(tmp_path / "straight"), strict=True):
        assert all(abs(got[k] - want[k]) <= 1e-9 * abs(want[k]) for k in want), (got, want)


def test_minutes_between_saves_are_kept_on_all_processes(forks: Forks, tmp_path: Path) -> None:
    """About every second, which is longer than a step even on a busy machine: some steps are saved and not all, by both processes alike."""
    out = tmp_path / "run"
    timed = ["--checkpoint.every-minutes", "0.02", "--train.steps", "60", "--train.eval-every", "0", "--checkpoint.no-final"]
    run = forks.start([*TINY, *MESHES[2], *timed, "--out", str(out)], 2)
    assert forks.wait(run) == [0, 0], run.text()
    steps = Store(out / "checkpoints").steps()
    assert 1 <= len(steps) < 50, steps


def test_a_checkpoint_is_verified_before_resuming_if_told(forks: Forks, tmp_path: Path) -> None:
    """With `--checkpoint.verify` the whole checkpoint is read first, and every damaged place is named before anything is restored."""
    out = tmp_path / "run"
    first = forks.start([*TINY, "--checkpoint.every", "4", "--out", str(out)])
    assert forks.wait(first) == [0], first.text()
    file = next(p for p in (out / "checkpoints/8/state/params.embed.weight/c").rglob("*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)
    again = forks.start([*TINY, "--resume", "auto", "--checkpoint.verify", "--out", str(out)])
    assert forks.wait(again) == [0], again.text()
    assert (
        "step 8 is damaged" in again.text() and "damaged in 1 places: array 'params.embed.weight' (params.embed.weight/c/" in again.text()
    )
    assert "resumed after step 4" in again.text()


def killed(forks: Forks, straight: Any, tmp_path: Path, seed: int, ranks: int, one: bool) -> None:
    """kill -9 at a random instant of a random stage, some times over; then finish."""
    out, luck = tmp_path / "run", random.Random(seed)
    for _ in range(2):
        run = forks.start([*TINY, *SAVING, *MESHES[ranks], "--out", str(out)], ranks, behind=seed % 2 == 1)
        until(run, out, luck.randint(0, STEPS - 2) if luck.random() < 0.8 else -1, 20)
        time.sleep(luck.random() * luck.choice([0.01, 0.1, 1.0]))
        run.signal(signal.SIGKILL, [luck.randrange(ranks)] if one else None)
        if one:
            time.sleep(0.2)  # as torchrun: the others are stopped when one has died
            run.signal(signal.SIGKILL)
        forks.wait(run)
    finish(forks, out, straight[ranks], ranks)


@pytest.mark.parametrize("seed", range(3))
def test_killed_runs_lose_nothing(seed: int, forks: Forks, straight: Any, tmp_path: Path) -> None:
    killed(forks, straight, tmp_path, seed, 1, False)


@pytest.mark.parametrize("seed", range(2))
def test_killed_ranks_lose_nothing(seed: int, forks: Forks, straight: Any, tmp_path: Path) -> None:
    killed(forks, straight, tmp_path, seed, 2, seed % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_killed_runs_lose_nothing_many_times(seed: int, forks: Forks, straight: Any, tmp_path: Path) -> None:
    killed(forks, straight, tmp_path, seed, 1 + seed % 2, seed % 4 == 1)


def stopped(forks: Forks, straight: Any, tmp_path: Path, seed: int, ranks: int) -> None:
    """A signal at a random instant: exit code 0, and a checkpoint of the step that was reached."""
    out, luck = tmp_path / "run", random.Random(seed)
    number = luck.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    run = forks.start(
        [*TINY, "--resume", "auto", "--checkpoint.every", luck.choice(["0", "1", "3"]), *MESHES[ranks], "--out", str(out)],
        ranks,
        behind=seed % 2 == 1,
    )
    end = time.monotonic() + 60
    want = luck.randint(0, STEPS - 1)
    while time.monotonic() < end and (_lines(out) < want or not run.started()):
        time.sleep(0.005)
    time.sleep(luck.random() * luck.choice([0.0, 0.05, 0.5]))
    run.signal(number, [luck.randrange(ranks)] if luck.random() < 0.5 else None)
    assert forks.wait(run, 60) == [0] * ranks, run.text()
    step = Store(out / "checkpoints").latest()
    assert step is not None and step >= _lines(out) - 1, run.text()
    assert f"after step {step}" in run.text() or step == STEPS, run.text()
    finish(forks, out, straight[ranks], ranks)


def _lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("seed", range(10))
def test_a_signal_saves_and_ends_with_0(seed: int, forks: Forks, straight: Any, tmp_path: Path) -> None:
    stopped(forks, straight, tmp_path, seed, 1 + (seed % 3 == 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_a_signal_saves_and_ends_with_0_many_times(seed: int, forks: Forks, straight: Any, tmp_path: Path) -> None:
    stopped(forks, straight, tmp_path, seed, 1 + seed % 2)
