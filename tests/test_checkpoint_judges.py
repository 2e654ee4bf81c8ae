"""Orbax in JAX and zarr-python open what we write; we restore what Orbax writes. Bit for bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl import checkpoint, tree
from mtl.checkpoint import geometry
from mtl.checkpoint.arrays import as_numpy
from mtl.cli import ckpt
from tests import judges
from tests.cases.checkpoint import values
from tests.ranks import Ranks

CASE = "tests.cases.checkpoint:"


def digest(state: Any) -> Any:
    """What the judges print, of a tree of tensors."""
    return judges.digest(tree.map(lambda x: x if x is None else as_numpy(x), state))


@pytest.mark.usefixtures("tiles")
def test_orbax_restores_ours(tmp_path: Path) -> None:
    layers = [values((3,)), {"b": values((2, 2))}]
    state = {
        "params": {
            "w": values((40, 30), torch.bfloat16),
            "big": values((700, 900)),
            "half": torch.randn(900, 800).bfloat16(),
            "layers": layers,
            "e": torch.ones(3).to(torch.float8_e4m3fn),
        },
        "opt": [{"mu": values((6,))}, [], {}],
        "step": torch.tensor(7, dtype=torch.int32),
        "none": None,
    }
    checkpoint.save(tmp_path / "12", state, host={"step": 12}, config={"a": 1}, extra={"_model/config.json": {"a": 1}, "_x": b"1"})
    found = judges.ask("orbax_readers", str(tmp_path / "12"))
    for name in ("pytree", "standard", "manager", "manager_args", "v1", "sharded"):
        assert found[name] == digest(state), name


def test_orbax_restores_what_many_processes_wrote(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(CASE + "save", 8, table="fsdp_tensor", world=8, path=str(tmp_path / "3"), precision="fp32")
    found = judges.ask("orbax_readers", str(tmp_path / "3"))
    want = checkpoint.inspect(tmp_path / "3")
    target = {name: torch.empty(a.shape, dtype=getattr(torch, a.dtype)) for name, a in want.arrays.items()}
    state = {
        name: digest(checkpoint.restore(tmp_path / "3", _nested(a.keys, target[name]), subset=True)) for name, a in want.arrays.items()
    }
    for name, info in want.arrays.items():
        theirs, ours = found["pytree"], state[name]
        for key in info.keys:
            theirs = theirs[key if isinstance(theirs, list) else str(key)]
            ours = ours[str(key)]
        assert theirs == ours, name


def _nested(keys: Any, leaf: Any) -> Any:
    for key in reversed(keys):
        leaf = {str(key): leaf}
    return leaf


def test_we_restore_what_orbax_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrote = judges.ask("orbax_writers", str(tmp_path))
    target = {
        "params": {"w": torch.empty(3, 4, dtype=torch.bfloat16), "b": torch.empty(4)},
        "opt": [{"mu": torch.empty(3, 4)}, (torch.empty(3, dtype=torch.int64), torch.empty((), dtype=torch.float64))],
        "scalar": torch.empty((), dtype=torch.int64),
        "none": None,
    }
    assert len(wrote["paths"]) == 6
    ckpt.main(["verify", wrote["paths"][0]])
    assert "can be read; it is not mtl's" in capsys.readouterr().out
    for path in wrote["paths"]:
        back = digest(checkpoint.restore(path, target))
        for name in ("params", "opt", "none"):
            assert back[name] == wrote["tree"][name], path
        assert int(checkpoint.restore(path, target)["scalar"]) == 7
        names = set(checkpoint.inspect(path).arrays)
        assert names == {"params.w", "params.b", "opt.0.mu", "opt.1.0", "opt.1.1", "scalar"}
        with pytest.raises(checkpoint.CheckpointError, match=r"params.b: in the checkpoint"):
            checkpoint.restore(path, {**target, "params": {"w": target["params"]["w"]}})


@pytest.mark.usefixtures("tiles")
def test_zarr_reads_ours(tmp_path: Path) -> None:
    state = {"w": values((700, 900)), "h": torch.randn(900, 800).half(), "n": torch.arange(5), "t": torch.arange(700000).to(torch.int16)}
    checkpoint.save(tmp_path / "c", state)
    for name, x in state.items():
        assert judges.ask("zarr_reader", str(tmp_path / "c/state" / name)) == judges.digest(np.asarray(x))


@pytest.mark.usefixtures("tiles")
def test_the_readers_of_the_page_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/checkpoint_format.md: its plain reader and its JAX reader print the same, which is what was saved; ours runs too."""
    page = (Path(__file__).parent.parent / "docs/checkpoint_format.md").read_text()
    plain, jax, ours = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    state = {"params": {"embedding": values((256, 256)), "w": [values((3, 4), torch.bfloat16)]}, "step": torch.tensor(50)}
    place = tmp_path / "runs/kept/checkpoints/50"
    monkeypatch.setattr(geometry, "TILE_BYTES", 1 << 14)
    checkpoint.save(place, state, host={"step": 50})
    lines = {
        "params.embedding float32 (256, 256) 2147450880.0",
        "params.w.0 bfloat16 (3, 4) 66.0",
        "step int64 () 50.0",
    }
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    for code in (plain, jax):
        assert len(code.strip().splitlines()) <= 10
        done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, env=env, check=False)
        assert set(done.stdout.splitlines()) == lines, done.stderr
    subprocess.run([sys.executable, "-c", ours + "assert state['params']['embedding'][1, 2] == 258"], env=env, cwd=tmp_path, check=True)
