"""``mtl ckpt``: inspect, verify, export, average and rechunk, as a user calls them."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtl import checkpoint, tree
from mtl.cli import ckpt
from mtl.errors import UserError
from tests.cases.checkpoint import values


def state(add: float = 0.0) -> Any:
    """A small train state."""
    return {
        "params": {"w": values((700, 900)) + add, "b": (values((30,)) + add).bfloat16()},
        "opt": [values((30,)) + add, torch.tensor(3.0 + add)],
        "step": torch.tensor(3 + int(add)),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two checkpoints."""
    for step, add in ((3, 0.0), (5, 2.0)):
        place = tmp_path / f"run/checkpoints/{step}"
        checkpoint.save(place, state(add), host={"step": step}, config={"lr": step / 10, "same": 1}, extra={"_model/config.json": {"a": 1}})
    return tmp_path / "run"


def back(path: Path) -> Any:
    """Restore all of it."""
    return checkpoint.restore(path, tree.map(lambda x: torch.empty_like(x, device="meta"), state()))


def test_inspect(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt.main(["inspect", str(run)])
    text = capsys.readouterr().out
    assert "checkpoints/5" in text and "step:        5" in text and "630,030 parameters" in text and '"lr": 0.5' in text
    assert any(line.split() == ["params.w", "float32", "700x900", "2.403", "1", "704x960", "352x480"] for line in text.splitlines()), text
    ckpt.main(["inspect", str(run / "checkpoints/3"), "--html", str(tmp_path / "a.html")])
    page = (tmp_path / "a.html").read_text()
    assert "<td>params.b</td>" in page and "bfloat16" in page and "http" not in page.replace("<!doctype html>", "")
    capsys.readouterr()
    ckpt.main(["inspect", str(run / "checkpoints/3"), "--diff", str(run / "checkpoints/5")])
    text = capsys.readouterr().out
    assert "params.w: values differ by up to 2" in text and "config lr: 0.3 | 0.5" in text and "same" not in text
    ckpt.main(["inspect", str(run / "checkpoints/3"), "--diff", str(run / "checkpoints/3")])
    assert capsys.readouterr().out == "no differences\n"


def test_a_page_may_go_without_a_name_and_with_differences(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, order in enumerate((["DIR", "--html"], ["--html", "DIR"], ["DIR", "--html", "--diff", str(run / "checkpoints/3")])):
        place = tmp_path / f"here{i}"
        place.mkdir()
        monkeypatch.chdir(place)
        arguments = ["inspect", *(str(run) if word == "DIR" else word for word in order)]
        ckpt.main(arguments)
        assert capsys.readouterr().out == "written: checkpoint-5.html\n"
        page = (place / "checkpoint-5.html").read_text()
        assert "<td>params.b</td>" in page and ("values differ by up to 2" in page) == (i == 2)
        with pytest.raises(UserError, match="exists already; nothing was written"):
            ckpt.main(arguments)
        assert [p.name for p in place.iterdir()] == ["checkpoint-5.html"]


def test_a_file_that_cannot_be_written_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (
        ["export-safetensors", str(run), str(tmp_path / "file/x")],
        ["inspect", str(run), "--html", str(tmp_path / "file/x")],
    ):
        with pytest.raises(UserError, match="cannot be written"):
            ckpt.main(arguments)
    ckpt.main(["export-safetensors", str(run), str(tmp_path / "new/x.safetensors")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(UserError, match=r"y.safetensors cannot be written: .*File too large"):
            ckpt.main(["export-safetensors", str(run), str(tmp_path / "new/y.safetensors")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt.main(["verify", str(run)])
    assert "are as they were written" in capsys.readouterr().out
    file = run / "checkpoints/5/state/opt.0/c/0"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged in 1 places"):
        ckpt.main(["verify", str(run / "checkpoints/5")])
    assert "array 'opt.0', file opt.0/c/0" in capsys.readouterr().out


def test_a_damaged_newest_is_not_passed_over(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name))
    (newest / "state/_mtl.json").write_text("")
    for command in ("verify", "inspect"):
        with pytest.raises(UserError, match=rf"{newest.name}/state/_mtl.json is damaged"):
            ckpt.main([command, str(run)])


def test_export(run: Path, tmp_path: Path) -> None:
    ckpt.main(["export-safetensors", str(run), str(tmp_path / "all.safetensors")])
    ckpt.main(["export-safetensors", str(run), str(tmp_path / "p.safetensors"), "--only", "params."])
    want = dict(tree.paths(state(2.0)))
    got = load_file(tmp_path / "all.safetensors")
    assert got.keys() == want.keys() and all(got[k].equal(want[k]) and got[k].dtype == want[k].dtype for k in want)
    assert set(load_file(tmp_path / "p.safetensors")) == {"params.w", "params.b"}
    with pytest.raises(UserError, match="exists already"):
        ckpt.main(["export-safetensors", str(run), str(tmp_path / "all.safetensors")])
    with pytest.raises(UserError, match="Did you mean"):
        ckpt.main(["export-safetensors", str(run), str(tmp_path / "x.safetensors"), "--only", "parms.w"])


def test_average(run: Path, tmp_path: Path) -> None:
    both = [str(run / "checkpoints/3"), str(run / "checkpoints/5")]
    ckpt.main(["average", *both, "--out", str(tmp_path / "mean")])
    got, want = back(tmp_path / "mean"), state(1.0)
    assert got["params"]["w"].equal(want["params"]["w"]) and got["params"]["b"].equal(want["params"]["b"]) and got["step"] == 5
    assert got["opt"][0].equal(want["opt"][0]) and got["opt"][1] == 5.0
    found = checkpoint.inspect(tmp_path / "mean")
    assert found.host["average_of"] == both and json.loads(found.read("_model/config.json")) == {"a": 1}
    checkpoint.save(tmp_path / "other", {"params": {"w": values((3, 3))}})
    with pytest.raises(UserError, match=r"array 'params.w' is float32 700x900 in .*, and float32 3x3 in"):
        ckpt.main(["average", both[0], str(tmp_path / "other"), "--out", str(tmp_path / "x"), "--only", "params.w"])


def test_rechunk(run: Path, tmp_path: Path) -> None:
    ckpt.main(["rechunk", str(run), str(tmp_path / "new"), "--parts", "params.w=4,2"])
    assert sorted(p.name for p in (tmp_path / "new/state/params.w/c").iterdir()) == ["0", "1", "2", "3"]
    assert checkpoint.inspect(tmp_path / "new").arrays["params.w"].file == (175, 450)
    got, want = back(tmp_path / "new"), state(2.0)
    assert all(a.equal(b) for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True))
    for parts, message in (("params.w=4", "gives 1 numbers"), ("params.w", "expected NAME=P"), ("parms=1", "Did you mean")):
        with pytest.raises(UserError, match=message):
            ckpt.main(["rechunk", str(run), str(tmp_path / "x"), "--parts", parts])


def test_an_unknown_command_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'inspect'"):
        ckpt.main(["inspct"])
    with pytest.raises(UserError, match="is no checkpoint"):
        ckpt.main(["inspect", str(tmp_path)])
