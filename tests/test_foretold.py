"""A run's plan: shown at its start, held against the measurement at its end, and never a reason to stop."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import foretold, planning, pretrain
from experiments.presets import PRESETS
from mtl.inspect import hardware
from mtl.inspect.mesh import planned_mesh
from mtl.precision import PRECISIONS
from mtl.sharding.parallel import Parallel
from mtl.train.step import StepOptions
from tests.forks import Forks
from tests.test_pretrain import MODEL, SHORT, metrics

CPU = torch.device("cpu")


class Said:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def made(first: bool = True, compile: str = "none", precision: str = "fp32") -> foretold.Foretold:
    setup = PRESETS["tiny"]
    rules, shape = pretrain.choose_layout(setup, 1)
    setup = pretrain.with_micro_batch(setup, rules, shape)
    options = StepOptions(PRECISIONS[precision], compile=compile)
    par = Parallel(planned_mesh(shape, 0, "cpu"), rules, pretrain.sizes(setup, rules, shape), torch.float32)
    return foretold.foretell(setup, shape, par, options, CPU, first, lambda: False)


def test_a_run_says_its_plan_and_compares(forks: Forks, tmp_path: Path) -> None:
    done = forks.complete(["tiny", *SHORT, *MODEL, "--out", str(tmp_path / "run")], plans=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("plan")]
    assert len(lines) == 2
    assert "GiB a device" in lines[0] and "time not planned (no table for this cpu device)" in lines[0]
    assert "plan against measured:" in lines[1] and "step not planned" in lines[1]
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["seconds"] is None and plan["memory"]["peak"] > plan["memory"]["weights"] > 0
    assert (tmp_path / "run/plan.html").stat().st_size > 2000
    records = metrics(tmp_path / "run")
    assert ["plan" in m for m in records] == [False, False, True]
    found: Any = records[-1]["plan"]
    assert found["peak_memory_gib"] == plan["memory"]["peak"] / 2**30
    assert found["measured_step_time"] == sum(m["step_time"] for m in records[1:]) / 2, "the first step warms up"
    assert found["step_time"] is None and found["step_time_error"] is None
    error = (found["peak_memory_gib"] - found["measured_peak_memory_gib"]) / found["measured_peak_memory_gib"]
    assert math.isclose(found["peak_memory_error"], error)


def test_planned_times_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(foretold, "known", lambda device: hardware.load("h200"))
    found, log = made(compile="step", precision="bf16"), Said()
    plan = found.plan
    assert plan is not None and plan.step is not None and plan.bound is not None
    foretold.show(found, tmp_path, "tiny", log)  # type: ignore[arg-type]
    assert "a step" in log.lines[0] and f"bound by {plan.bound[0]}" in log.lines[0] and "MFU" in log.lines[0]
    hook = found.hook(5, log)  # type: ignore[arg-type]
    records = [{"step_time": t, "peak_memory_gib": 9.0} for t in (50.0, 1.0, 1.0, 2 * plan.step, 2 * plan.step)]
    for i, record in enumerate(records):
        hook(i + 1, None, record)
    last: Any = records[-1]["plan"]
    assert math.isclose(last["step_time_error"], -0.5), "the first three steps are left out"
    assert "(-50.0%)" in log.lines[-1] and "plan" not in records[-2]


def test_a_plan_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(planning, "plan", broken)
    found, log = made(), Said()
    foretold.show(found, tmp_path, "tiny", log)  # type: ignore[arg-type]
    assert log.lines == ["plan: none (ZeroDivisionError: oh)"]
    record: dict[str, Any] = {"step_time": 1.0, "peak_memory_gib": 1.0}
    found.hook(1, log)(1, None, record)  # type: ignore[arg-type]
    assert record["plan"]["peak_memory_gib"] is None and len(log.lines) == 1
    assert made(first=False).plan is None, "other ranks plan nothing"


def test_a_plan_that_does_not_fit_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import dataclasses

    small = dataclasses.replace(hardware.load("h200"), memory_bytes=1 << 20)
    monkeypatch.setattr(foretold, "known", lambda device: small)
    log = Said()
    foretold.show(made(), tmp_path / "gone", "tiny", log)  # type: ignore[arg-type]
    assert "WARNING: the plan lacks" in log.lines[1] and "most goes to" in log.lines[1]
    assert "could not be written" in log.lines[2], "a folder that is gone is said and stops nothing"
