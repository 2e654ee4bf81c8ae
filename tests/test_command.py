"""The command `mtl` as a shell starts it: exit codes, output that is JSON and nothing else, and readers that leave early."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtl.cli import main as command
from tests.corpora import write

ROOT = Path(__file__).parent.parent
MTL = [sys.executable, "-m", "mtl.cli.main"]


def mtl(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MTL, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **how)


def headed(words: list[str], lines: int) -> tuple[int, str, str]:
    """Read some lines of a command's output and close the pipe, as `| head` does: exit code, these lines, standard error."""
    with subprocess.Popen([*MTL, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout and run.stderr
        read = "".join(run.stdout.readline() for _ in range(lines))
        run.stdout.close()
        said = run.stderr.read()
        return run.wait(60), read, said


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first six documents of the format document's known answers: the default split gives all to training."""
    return write(tmp_path_factory.mktemp("known") / "known", [[0] * n for n in [5, 3, 7, 2, 6, 4]])


def test_the_order_command_of_the_issue_prints_megatrons_indices(known: str) -> None:
    run = mtl(*f"data order --data {known} --samples 9 --seq-len 4 --seed 1234 --order megatron --json".split())
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert found["document_index"] == [2, 1, 5, 0, 4, 3, 0, 4, 3, 2, 5, 1]
    want = "(0,0)(0,4)(1,1)(2,2)(3,2)(4,1)(4,5)(6,1)(7,0)(7,4)(9,0)(9,4)(10,1)(11,1)"
    assert "".join(f"({a},{b})" for a, b in found["sample_index"]) == want
    assert found["shuffle_index"] == [1, 0, 3, 2, 5, 4, 8, 9, 11, 7, 10, 12, 6]


def test_a_blend_prints_megatrons_choices(known: str) -> None:
    flags = "--samples 12 --seq-len 4 --seed 1 --order megatron --json"
    run = mtl("data", "order", "--data", "30", known, "70", known, *flags.split())
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["dataset_index"][:12] == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("order", ["stateless", "megatron"])
def test_a_reader_that_leaves_ends_the_command_quietly(known: str, order: str) -> None:
    code, read, said = headed(f"data order --data {known} --samples 4000 --seq-len 4 --order {order}".split(), 2)
    assert said == "" and code == command.READER_GONE
    assert read.startswith("split" if order == "stateless" else "order")


def test_the_list_of_commands_may_be_headed_too() -> None:
    code, read, said = headed([], 1)
    assert read.startswith("usage: mtl") and said == "" and code in (0, command.READER_GONE)


def test_another_broken_pipe_is_an_error_still(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(command, "run", fail)
    with pytest.raises(BrokenPipeError):
        command.while_read()


def test_every_command_that_is_listed_is_one() -> None:
    for name in command.commands():
        assert callable(getattr(importlib.import_module(f"mtl.cli.{name}"), "main", None)), name
