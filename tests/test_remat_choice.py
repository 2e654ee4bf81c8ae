"""`--remat auto`: what is chosen fits by the plan, more memory never recomputes more, and what cannot be says so."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

import sharding_rules
from experiments import pretrain
from experiments.presets import PRESETS
from experiments.remat_choice import ORDER, candidates, choose, memory_of, parse_budget, planned
from mtl.errors import UserError
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import MeshShape
from mtl.train.step import StepOptions
from tests.forks import Forks
from tests.test_pretrain import MODEL, SHORT

PEAKS = {"none": 100, "gather": 90, "selective": 80, "mlp:4": 85, "mlp:2": 70, "mlp": 60, "dense": 50, "full": 40}


def test_the_first_that_fits_is_chosen_and_nothing_after_it_is_planned() -> None:
    asked: list[str] = []

    def peak(remat: str) -> int:
        asked.append(remat)
        return PEAKS[remat]

    found = choose(peak, 80)
    assert found.remat == "selective" and asked == ["none", "gather", "selective"]
    assert found.peaks == {"none": 100, "gather": 90, "selective": 80}
    chosen = [ORDER.index(choose(PEAKS.__getitem__, budget).remat) for budget in range(40, 120)]
    assert chosen == sorted(chosen, reverse=True) and {ORDER[i] for i in chosen} == set(ORDER) - {"mlp:4"}
    with pytest.raises(UserError, match=r"Closest comes full, with a planned peak of 0.00 GiB"):
        choose(PEAKS.__getitem__, 39)


def test_budgets_are_read() -> None:
    assert [parse_budget(text, 1000) for text in ("auto", "auto:80%", "auto:2KiB", "auto:1.5GB", "auto:7")] == [
        900,
        800,
        2048,
        1500000000,
        7,
    ]
    for text in ("auto:", "auto:many", "auto:120%", "auto:0%", "auto:-3GiB", "auto:x%"):
        with pytest.raises(UserError, match="expected auto, auto:100GiB"):
            parse_budget(text, 1000)
    assert memory_of(torch.device("cpu"), 2) * 2 <= memory_of(torch.device("cpu"), 1) + 1


def test_plans_of_a_real_model_decide() -> None:
    """A long sample on 2 of 4 devices: budgets between the planned peaks walk through the choices, and each choice's own plan fits."""
    preset = PRESETS["tiny"]
    model = dataclasses.replace(preset.model, layers=8)
    train = dataclasses.replace(preset.train, global_batch_size=4, micro_batch_size=2, seq_len=2048)
    setup = dataclasses.replace(preset, model=model, train=train, remat="auto:1GiB")
    rules, shape = sharding_rules.load("fsdp"), MeshShape(fsdp=2)
    options = StepOptions(PRECISIONS["bf16"], "none", "step")
    plan = functools.cache(planned(setup, rules, shape, pretrain.sizes(setup, rules, shape), options, torch.device("meta"), False))
    peaks = {remat: plan(remat).memory.peak for remat in ORDER}
    assert peaks["full"] < peaks["dense"] < peaks["mlp"] < peaks["mlp:2"] < peaks["none"] and peaks["selective"] < peaks["none"]
    places = [ORDER.index(choose(peaks.__getitem__, budget).remat) for budget in sorted(peaks.values())]
    assert places == sorted(places, reverse=True) and len(set(places)) >= 4
    for budget in peaks.values():
        found = choose(peaks.__getitem__, budget)
        assert plan(found.remat).memory.peak <= budget


def test_a_run_chooses_says_so_and_trains(forks: Forks, tmp_path: Path) -> None:
    flags = ["tiny", *SHORT, *MODEL]
    done = forks.complete([*flags, "--remat", "auto", "--out", str(tmp_path / "run")])
    assert done.returncode == 0 and "remat none: chosen for" in done.stdout, done.stderr
    assert '"remat": "none"' in (tmp_path / "run/config.json").read_text()
    for ranks, remat, said in ((2, "auto:1MiB", "Closest comes"), (1, "auto:lots", "--remat is 'auto:lots'")):
        refused = forks.complete([*flags, "--remat", remat, "--out", str(tmp_path / "other")], ranks=ranks)
        assert refused.returncode != 0 and refused.stderr.count(said) == 1 and not (tmp_path / "other").exists(), refused.stderr


def test_a_run_that_offloads_activations_chooses_among_layers_computed_again(forks: Forks, tmp_path: Path) -> None:
    flags = ["tiny", *SHORT, *MODEL, "--offload", "activations", "--out", str(tmp_path / "run")]
    done = forks.complete([*flags, "--remat", "auto"])
    assert done.returncode == 0 and "remat every:4: chosen for" in done.stdout, done.stderr
    assert candidates(MeshShape(tensor=2), "optimizer") == ORDER


def test_without_a_plan_auto_is_refused(forks: Forks, tmp_path: Path) -> None:
    refused = forks.complete(["tiny", *SHORT, *MODEL, "--lora.rank", "2", "--remat", "auto", "--out", str(tmp_path / "run")])
    assert refused.returncode == 2 and "plans do not cover adapters" in refused.stderr and not (tmp_path / "run").exists()
