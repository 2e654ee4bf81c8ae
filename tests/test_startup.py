"""What a second start finds: a function's name in the compiler's cache, and the cache itself."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl import tree
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.runtime import remembered
from mtl.runtime.compile import compiled
from mtl.runtime.fingerprint import fingerprint
from mtl.sharding.shard_map import to_local
from mtl.train import gradient
from mtl.train.loss import Remat, make_loss
from tests.cases.train import batch
from tests.small import MODELS, SEQ
from tests.test_pretrain import MODEL, ROOT, SHORT, metrics, start

CACHED = """
import torch
from mtl.runtime.compile import compiled
from mtl.runtime.compile_time import compile_time
from torch.func import grad

traced = []

def make(scale):
    def loss(x):
        traced.append(0)
        return ((x @ x).sin() * scale).sum()
    return compiled(grad(loss))

x = torch.arange(16.0).reshape(4, 4) / 16
found = [make(scale)(x).sum().item() for scale in (2.0, 3.0)]
spent = compile_time()
print(found, len(traced), spent.hits, spent.misses, spent.uncached)
"""


def made(scale: Any, more: Any = None) -> Callable[[Any], Any]:
    """Close over values."""
    return lambda x, y=more: x * scale + y


def test_a_name_tells_what_is_closed_over() -> None:
    assert fingerprint(made(2.0)) == fingerprint(made(2.0))
    config = decoder.Config(layers=2, embed=16, heads=2, kv_heads=1, mlp=16, vocab=32)
    values = [2.0, 3.0, 2, "2", None, (2.0,), [2.0], {"a": 1}, {"a": 2}, torch.float32, config, dataclasses.replace(config, layers=3),
              made(1.0), made(1.5), functools.partial(made, 2), functools.partial(made, 3), torch.ops.aten.mm, torch.ops.aten.mm.default,
              decoder, decoder.Config]  # fmt: skip
    names = [fingerprint(made(value)) for value in values] + [fingerprint(made(0.0, value)) for value in values]
    assert None not in names and len(set(names)) == len(names)


def test_what_cannot_be_told_has_no_name() -> None:
    assert fingerprint(made(torch.ones(2))) is None and fingerprint(made({"a": [torch.ones(2)]})) is None
    assert fingerprint(made(torch.Generator())) is None and fingerprint(made(object())) is None


def test_hidden_fields_do_not_count() -> None:
    @dataclasses.dataclass
    class Held:
        size: int
        memo: Any = dataclasses.field(default=None, repr=False)

    assert fingerprint(made(Held(1, object()))) == fingerprint(made(Held(1))) != fingerprint(made(Held(2)))


def test_a_model_s_loss_has_a_name_that_its_settings_change(one: Any) -> None:
    config = decoder.Config(layers=1, embed=16, heads=2, kv_heads=1, head_size=8, mlp=16, vocab=32)
    sizes = {**decoder.sizes(config), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), 16), "batch": 1}

    def name(precision: str = "fp32", remat: str = "none", **changes: Any) -> str | None:
        changed = dataclasses.replace(config, **changes)
        par = one(**{**sizes, **decoder.sizes(changed)})
        par.layout("BSD")  # fills a memo, which must not count
        return fingerprint(make_loss(decoder, changed, par, PRECISIONS[precision], Remat(remat)))

    names = [name(), name("bf16"), name(remat="full"), name(layers=2), name(attention_impl="plain")]
    assert None not in names and len(set(names)) == 5 and names[0] == name()


def test_a_second_process_finds_graphs_and_traces_less(tmp_path: Path) -> None:
    """Two functions of one code, which differ in a constant, must not be mistaken for each other."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    (tmp_path / "program.py").write_text(CACHED)
    runs = [subprocess.run([sys.executable, tmp_path / "program.py"], env=env, capture_output=True, text=True, check=False) for _ in "ab"]
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    said = [run.stdout for run in runs]
    assert said[0].split("]")[0] == said[1].split("]")[0]
    cold, warm = ([int(n) for n in text.split("]")[1].split()] for text in said)
    assert cold[1:] == [0, 2, 0] and warm[1:] == [2, 0, 0]
    assert cold[0] == 4, "a first start runs each function for its shapes and for its graph, not once more for what it writes"
    assert warm[0] == 0, "the second start traces nothing"


@pytest.mark.parametrize(("model", "precision"), [("llama", "bf16"), ("llama", "fp64"), ("gpt", "fp32"), ("llama_tied", "fp16")], ids=str)
def test_dynamo_is_told_shapes_without_a_backward(one: Any, monkeypatch: pytest.MonkeyPatch, model: str, precision: str) -> None:
    """What is told instead of running the gradient has its structure, shapes and types."""
    held: list[Any] = []
    monkeypatch.setattr(gradient, "compiled", lambda fn, backend, options, like: held.extend([fn, like]))
    config, types = MODELS[model], PRECISIONS[precision]
    par = one(**{**decoder.sizes(config), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), SEQ), "batch": 2})
    params = tree.map(to_local, init(decoder.specs(config), par.rules, par.mesh, 0, types.compute))
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, config, 0, 2, False, dtype=types.param).items()}
    arguments = (gradient.apart(params), {**data, "key": torch.tensor(1)}, torch.tensor(1.0, dtype=types.param))
    gradient.value_and_grad(make_loss(decoder, config, par, types, Remat("none")), "step", "inductor", rest=types.param)
    told, ran = (tree.flatten(fn(*arguments)) for fn in reversed(held))
    assert told[1] == ran[1] and [(x.shape, x.dtype) for x in told[0]] == [(x.shape, x.dtype) for x in ran[0]]


def test_shapes_alone_come_from_what_is_like_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    asked: list[str] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        asked.append("fn")
        return x.sin() + 1

    def like(x: torch.Tensor) -> torch.Tensor:
        asked.append("like")
        return torch.empty_like(x)

    x = torch.arange(6.0)
    assert torch.allclose(compiled(fn, like=like)(x), x.sin() + 1)
    assert asked == ["like", "fn"]


def test_the_cache_lies_where_it_is_told_or_with_the_user(tmp_path: Path) -> None:
    code = """
import json, os, sys
from mtl.runtime import process
FLASH4 = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
for given in json.loads(sys.argv[1]):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", *FLASH4):
        os.environ.pop(name, None)
    os.environ.update(given)
    process.prepare_environment()
    print(os.environ.get("TORCHINDUCTOR_CACHE_DIR"), *(os.environ.get(name) for name in FLASH4))
"""
    (tmp_path / "file").touch()
    given = [{"TORCHINDUCTOR_CACHE_DIR": "/given"}, {"XDG_CACHE_HOME": str(tmp_path)}, {"XDG_CACHE_HOME": str(tmp_path / "file/under")}]
    command = [sys.executable, "-c", code, json.dumps(given)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    mine = tmp_path / "mtl/compiled"
    assert done.stdout.splitlines() == ["/given 1 /given/flash4", f"{mine} 1 {mine}/flash4", "None None None"], "at last torch's own"


@pytest.mark.slow
def test_a_run_tells_its_compile_time_and_the_next_one_is_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["tiny", *SHORT, *MODEL, "--precision", "fp32", "--compile", "step"]
    runs = [start([*flags, "--out", str(tmp_path / name)]) for name in "ab"]
    assert [r.returncode for r in runs] == [0, 0], runs[0].stderr
    cold, warm = (metrics(tmp_path / name) for name in "ab")
    assert "compiled in step 1" in runs[0].stdout and "graphs 2 from the cache, 0 new" in runs[1].stdout
    assert warm[0]["compile_time"] < cold[0]["compile_time"] / 2 and "compile_time" not in cold[1]
    assert [m["loss"] for m in cold] == [m["loss"] for m in warm]


@pytest.mark.slow
def test_the_bench_tells_cold_from_warm(tmp_path: Path) -> None:
    flags = ["--preset", "tiny", "--layers", "1", "--seq-len", "32", "--precision", "fp32", "--micro-batch-size", "1"]
    command = [sys.executable, "experiments/bench/startup.py", *flags, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "found.json").read_text())["starts"]
    assert found[0]["graphs made"] == found[1]["graphs from cache"] == 2 and found[1]["graphs made"] == 0
    assert found[1]["first step"] < found[0]["first step"] and "cold" in done.stdout


_library: Any = torch.library.Library("mtl_test_startup", "DEF")
_library.define("put(Tensor(a!) x, Tensor y) -> Tensor")
_library.impl("put", lambda x, y: (x.add_(y), x + 1)[1], "CPU")
torch.library.register_fake("mtl_test_startup::put", lambda x, y: torch.empty_like(x), lib=_library)


@pytest.mark.parametrize("name", ["writes", "writes_by_an_operation", "gives_its_own", "gives_a_part", "pure"])
def test_what_writes_or_gives_its_arguments_is_run_for_its_effects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    put: Any = torch.ops.mtl_test_startup.put
    kinds = {
        "writes_by_an_operation": lambda x: put(x, x.sin()),
        "writes": lambda x: x.mul_(3) + 1,
        "gives_its_own": lambda x: (x, x + 1),
        "gives_a_part": lambda x: (x.t()[0], x + 1),
    }
    fn = kinds.get(name, lambda x: (x.t() + 1, x.sum()))
    given, same = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3)
    found, expected = tree.leaves(compiled(fn)(given)), tree.leaves(fn(same))
    assert torch.equal(given, same) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [x.data_ptr() == given.data_ptr() for x in found] == [x.data_ptr() == same.data_ptr() for x in expected]
    said = json.loads(next((tmp_path / "mtl").iterdir()).read_text())
    assert said["writes_nothing"] == (name == "pure")


def test_shapes_are_recalled_for_the_same_name_and_arguments_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given, out = [torch.ones(2, 3)], [torch.zeros(3, 2, dtype=torch.bfloat16).t(), torch.ones(())]
    structure = tree.flatten({"a": out[0], "b": (out[1],)})[1]
    assert remembered.recall("name", given) is None
    remembered.remember("name", given, remembered.Result(remembered.metas(out), structure, True))
    found = remembered.recall("name", given)
    assert found is not None and found.structure == structure
    assert [(x.shape, x.stride(), x.dtype) for x in found.make()] == [(x.shape, x.stride(), x.dtype) for x in out]
    others = ([torch.ones(3, 2)], [torch.ones(3, 2).t()], [torch.ones(2, 3).double()])
    for key, other in (("eman", given), *(("name", other) for other in others)):
        assert remembered.recall(key, other) is None
    next((tmp_path / "mtl").iterdir()).write_text("{")
    assert remembered.recall("name", given) is None
