"""Products by quack's kernels: which ones, with a stand-in for the package; the package itself on a GPU that has it."""

import dataclasses
import sys
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl import tree
from mtl.errors import UserError
from mtl.kernels import gated, products
from mtl.models import decoder
from mtl.ops import gated as mlp
from mtl.ops import product
from mtl.ops.late import after
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.params import decayed
from mtl.precision import PRECISIONS
from mtl.sharding.layout import Layout
from mtl.sharding.shard_map import to_local
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.products import Config, Package, standing_in
from tests.cases.train import batch
from tests.compare import close
from tests.ranks import Ranks
from tests.small import MODELS
from tests.test_documents import draw


@pytest.fixture
def package() -> Generator[Package]:
    with standing_in() as found:
        yield found


def steps(one: Any, model: str, units: int, compile: str) -> dict[str, Tensor]:
    """Take two steps of a small model in float64 on one device: losses and parameters."""
    cfg, policy = MODELS[model], PRECISIONS["fp64"]
    par = one(**decoder.sizes(cfg), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), 8), batch=2)
    par = dataclasses.replace(par, quack=units)
    optimizer = adamw(decayed(decoder.specs(cfg)))
    state = init_state(decoder.specs(cfg), par.rules, par.mesh, 0, policy, optimizer)
    step = make_step(decoder, cfg, par, optimizer, schedule("constant", 1e-2, 9), StepOptions(policy, compile=compile, backend="aot_eager"))
    found = {f"loss.{i}": step(state, batch(par, cfg, i, 2, False, size=4))[1]["loss"] for i in range(2)}
    return found | {path: to_local(x).clone() for path, x in tree.paths(state.params)}


@pytest.mark.parametrize(("model", "layer"), [("llama", 7), ("gpt", 6)])
def test_a_step_multiplies_by_quack_and_gets_the_same(one: Any, package: Package, model: str, layer: int) -> None:
    want = steps(one, model, 0, "none")
    assert not package.calls
    for compile in ("none", "step"):
        package.calls.clear()
        close(steps(one, model, 132, compile), want)
        calls = (MODELS[model].layers * layer + 1) * 3 * 4  # and the head; forward and its two gradients; micro-batches of all steps
        assert len(package.calls) == calls, compile


def test_what_backward_keeps_is_not_copied_for_quack(one: Any, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers are compiled alone, what is made again waits for the gradient; operands of a product that are at hand need not."""
    waited: list[Tensor] = []
    monkeypatch.setattr(product, "after", lambda x, grad: (waited.append(x), after(x, grad))[1])
    steps(one, "llama", 0, "block")
    usual = len(waited)
    waited.clear()
    steps(one, "llama", 132, "block")
    assert package.calls and 0 < len(waited) == usual


@pytest.mark.parametrize(
    ("how", "gates", "remat"),
    [
        ("none", False, "none"), ("step", False, "none"), ("none", True, "none"), ("step+engine", True, "none"), ("block", True, "none"),
        ("step", True, "dense"), *(pytest.param("step", True, remat, marks=pytest.mark.slow) for remat in ("none", "mlp:1")),
    ],
)  # fmt: skip
def test_products_under_fsdp_are_one_devices(ranks: Ranks, references: Path, how: str, gates: bool, remat: str) -> None:
    path = str(references / "llama-1.safetensors")
    if not Path(path).exists():
        ranks.run("tests.cases.train:reference", 1, model="llama", micros=1, path=path)
    case = {"table": "fsdp", "world": 2, "model": "llama", "remat": remat, "how": how, "micros": 1}
    found = ranks.run("tests.cases.products:parity", 2, **case, path=path, gates=gates)
    assert found["error"] < 1e-9 and found["moved"] > 1e-3, found
    products = (MODELS["llama"].layers * 4 + 1) * 3 * 3  # query, key and value are one, and so are gate and up
    inside = MODELS["llama"].layers * 2 * 3 if gates else 0
    if remat == "none":
        assert (found["products"], found["gates"]) == (products - inside, inside)
    else:
        assert found["gates"] > inside, "forward's is taken again"


def test_only_large_products_that_fill_the_device_are_quacks() -> None:
    units = 132
    assert (
        products.wins(16384, 28672, 4096, units) and products.wins(4096, 28672, 16384, units) and products.wins(16384, 4096, 14336, units)
    )
    assert not products.wins(4096, 4096, 16384, units), "2.7 rounds over the device are three"
    assert not products.wins(14336, 4096, 16384, units)
    assert not products.wins(1024, 4096, 4096, units) and not products.wins(16384, 1, 1 << 30, units)
    whole = torch.empty(64, 128, dtype=torch.bfloat16)
    assert products.lies(whole) and products.lies(whole.t()) and products.lies(whole[:, 8:64])
    assert (
        not products.lies(whole[:, 1:65])
        and not products.lies(whole[:, ::2])
        and not products.lies(whole[:, :12])
        and not products.lies(whole.float())
    )


@pytest.mark.parametrize("kind", gated.KINDS)
@pytest.mark.parametrize("frozen", [(), ("gate", "up"), ("down",), ("x",)])
def test_an_mlp_with_its_gate_inside_is_the_plain_one(one: Any, package: Package, kind: str, frozen: tuple[str, ...]) -> None:
    """On one device, which makes copies of weights in the type of what they are multiplied by."""
    par = dataclasses.replace(one(embed=16, mlp=24, seq=8, residual_seq=8, batch=2), quack=132, gated=True)
    x, down, *wide = draw(1, 2, 8, 16), *(draw(i, 16, 24).float() for i in range(2, 5))
    values = {"x": x, "gate": wide[0], "up": wide[1], "down": down}
    free = {name: t for name, t in values.items() if name not in frozen}

    def inside(free: dict[str, Tensor]) -> Tensor:
        now = values | free
        p = {name: {"weight": now[name]} for name in ("gate", "up", "down")}
        assert mlp.fits(par, kind, now["x"], p)
        return mlp.mlp(par, kind, now["x"], p).sin().sum()

    def plain(free: dict[str, Tensor]) -> Tensor:
        now = {name: t.double() for name, t in (values | free).items()}
        return ((gated.KINDS[kind][1](now["x"] @ now["gate"]) * (now["x"] @ now["up"])) @ now["down"].t()).sin().sum()

    close(*({"value": v, **g} for g, v in (torch.func.grad_and_value(fn)(free) for fn in (inside, plain))), bound=1e-6)
    assert len(package.gates) == 2 and package.gates[0].tile_n == package.gates[1].tile_n == 192


def test_what_an_mlp_with_its_gate_inside_is_not_for(one: Any, package: Package) -> None:
    par = dataclasses.replace(one(embed=16, mlp=24, seq=8, residual_seq=8, batch=2), quack=132, gated=True)
    x = draw(1, 2, 8, 16)
    p = {name: {"weight": draw(2, 16, 24).float()} for name in ("gate", "up", "down")}
    assert mlp.fits(par, "swiglu", x, p)
    assert not mlp.fits(dataclasses.replace(par, gated=False), "swiglu", x, p)
    assert not mlp.fits(dataclasses.replace(par, fp8="tensor"), "swiglu", x, p)
    assert not mlp.fits(par, "geglu", x, p), "the package's gelu is the one by tanh"
    assert not mlp.fits(par, "swiglu", x, {**p, "gate": {**p["gate"], "bias": x}}) and not mlp.fits(par, "swiglu", x, {})
    split = one(embed=16, mlp=24, seq=8, residual_seq=8, batch=2)
    split._layouts["S", "act"] = Layout((("tensor",),))
    apart = dataclasses.replace(split, quack=132, gated=True)
    assert not mlp.fits(apart, "swiglu", x, p), "a sequence that is split otherwise around the MLP would have to be gathered"
    assert not mlp.fits(par, "swiglu", x.float(), p), "weights that are used as they lie would be copied to take turns"


def test_why_gates_stay_outside_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def package() -> Any:
        raise TypeError("no key")

    monkeypatch.setattr(gated, "_package", package)
    monkeypatch.setitem(sys.modules, "quack.epilogue.library", types.ModuleType("library"))
    gated.there.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"gates stay outside quack's products: TypeError: no key"):
        assert not gated.there()
    gated.there.cache_clear()


def test_only_large_mlps_have_their_gate_inside() -> None:
    assert gated.fits(132, "swiglu", 16384, 4096, 14336) and gated.fits(132, "swiglu", 32768, 2048, 8192)
    assert not gated.fits(132, "swiglu", 256, 4096, 14336) and not gated.fits(132, "geglu", 16384, 4096, 14336)
    assert not gated.fits(132, "swiglu", 16384, 4096, 14340), "rows of what is copied into a kernel begin at multiples of 16 bytes"


def test_a_product_names_its_kernel(package: Package) -> None:
    a, b = draw(1, 16, 8), draw(2, 8, 32)
    close(products.multiply(132, a, b), a @ b)
    close(products.multiply(132, b.t(), a.t()), b.t() @ a.t())
    kernel = package.calls[0]
    assert package.calls == [kernel] * 2 and (kernel.tile_m, kernel.tile_n) == products.TILE and kernel.device_capacity == 9


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert products.choose("auto", cpu, torch.bfloat16) == products.choose("torch", cpu, torch.bfloat16) == 0
    with pytest.raises(UserError, match=r"--products quack needs an NVIDIA GPU of compute capability 9 .*device is cpu"):
        products.choose("quack", cpu, torch.bfloat16)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"compute capability 9 .*device is cuda of 8\.0"):
        products.choose("quack", gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match="multiplies bfloat16 and float16, not float32"):
        products.choose("quack", gpu, torch.float32)
    monkeypatch.setattr(products.importlib.metadata, "version", lambda name: "0.0")
    products.problem.cache_clear()
    for package, why in (((lambda A, B: None, Config), "has no out, config"), ((lambda: None, dict[str, int]), "has no A, B")):
        monkeypatch.setattr(products, "_package", lambda package=package: package)
        assert why in str(products.refuses(gpu, torch.bfloat16))
        assert products.choose("auto", gpu, torch.bfloat16) == 0
        products.problem.cache_clear()


@pytest.mark.skipif(
    products.refuses(torch.device("cuda"), torch.bfloat16) is not None if torch.cuda.is_available() else True,
    reason="needs a Hopper GPU and quack-kernels",
)
@pytest.mark.parametrize("shape", [(2048, 6144, 8192), (8192, 2048, 2056), (4096, 12288, 4096)])
def test_on_a_gpu_products_are_those_of_float32(shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x, w, g = (
        torch.randn(size, generator=generator, device="cuda").to(torch.bfloat16)
        for size in ((rows, inner), (inner, columns), (rows, columns))
    )
    for a, b in ((x, w), (g, w.t()), (x.t(), g)):
        want, got, usual = a.float() @ b.float(), products.launch(a, b), a @ b
        assert (got.float() - want).norm() <= 1.01 * (usual.float() - want).norm()
        assert torch.equal(got, products.launch(a, b))


@pytest.mark.skipif(
    products.refuses(torch.device("cuda"), torch.bfloat16) is not None if torch.cuda.is_available() else True,
    reason="needs a Hopper GPU and quack-kernels",
)
@pytest.mark.parametrize(
    ("kind", "shape"), [("swiglu", (2048, 1024, 6144)), ("geglu_tanh", (1024, 2048, 2056)), ("reglu", (512, 512, 1000))]
)
def test_on_a_gpu_gates_inside_are_those_of_float32(kind: str, shape: tuple[int, int, int]) -> None:
    assert gated.there()
    rows, inner, columns = shape
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((rows, inner), (inner, 2 * columns), (inner, columns), (rows, inner))
    x, wide, down, grad = (torch.randn(size, generator=generator, device="cuda").to(torch.bfloat16) for size in shapes)
    wide = (wide * inner**-0.5).to(torch.bfloat16)

    def inside(gate: Tensor, up: Tensor) -> Tensor:
        return gated.KINDS[kind][1](gate) * up

    pairs, out = gated.launch(x, wide, kind)
    d_pairs, again = gated.launch_back(grad, down, pairs, kind)
    exact = x.float() @ wide.float()
    made, pull = torch.func.vjp(inside, pairs[:, ::2].float(), pairs[:, 1::2].float())
    back = torch.stack(pull(grad.float() @ down.float()), -1).flatten(1)
    for got, want in ((pairs, exact), (out, inside(exact[:, ::2], exact[:, 1::2])), (again, made), (d_pairs, back)):
        assert (got.float() - want).norm() < 4e-3 * want.norm()
    twice = (*gated.launch(x, wide, kind), *gated.launch_back(grad, down, pairs, kind))
    assert all(torch.equal(a, b) for a, b in zip(twice, (pairs, out, d_pairs, again), strict=True))
