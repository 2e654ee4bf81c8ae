"""FlashAttention 4: what mtl asks of the package, with a stand-in that keeps its rules; the package itself on a GPU that has it."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vjp

from mtl.errors import UserError
from mtl.generate.decode import generate
from mtl.inspect.operations import attention_flops, kind_of
from mtl.kernels import attention, flash4
from mtl.kernels.attention import KERNELS, attend, choose
from mtl.kernels.masks import Documents, Mask
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.runtime.compile import compiled
from mtl.sharding.parallel import Parallel
from tests.compare import close
from tests.small import MODELS
from tests.test_documents import WITHIN, draw, qkv, within

OPS: Any = torch.ops.mtl_flash4


def rule(q: Tensor, k: Tensor, left: int | None, right: int | None) -> Tensor:
    """Which pairs count [Q, T]: the last query stands beside the last key, and None is no limit. Below 0 the package has its own ideas."""
    gap = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(k.shape[0])
    assert left is None or left >= 0
    assert right is None or right >= 0
    return (gap <= (gap.max() if left is None else left)) & (-gap <= (-gap.min() if right is None else right))


class Package:
    """The package's two functions, spelled out for one row or document at a time."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def rows(self, q: Tensor, k: Tensor, more: dict[str, Any]) -> Any:
        """List each row, or document of the joined rows: which row, its queries and its keys."""
        if more["cu_seqlens_q"] is None:
            return [(i, slice(0, q.shape[1]), slice(0, k.shape[1])) for i in range(q.shape[0])]
        ends = [more[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
        assert all(more[name].dtype == torch.int32 for name in ("cu_seqlens_q", "cu_seqlens_k"))
        spans = list(zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False))
        assert max(b - a for a, b, _, _ in spans) <= more["max_seqlen_q"] and max(d - c for _, _, c, d in spans) <= more["max_seqlen_k"]
        return [(..., slice(a, b), slice(c, d)) for a, b, c, d in spans if b > a and d > c]

    def one(self, q: Tensor, k: Tensor, more: dict[str, Any]) -> Tensor:
        """Give a row's scores [H, Q, T]."""
        scores = torch.einsum("qhk,thk->hqt", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * more["softmax_scale"]
        return scores.masked_fill(~rule(q, k, more["window_size_left"], more["window_size_right"]), float("-inf"))

    def _flash_attn_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, window_size_left: int | None, window_size_right: int | None,
        return_lse: bool, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> Any:  # fmt: skip
        more = {name: value for name, value in locals().items() if name not in ("self", "q", "k", "v")}
        self.calls.append(more)
        assert return_lse
        sizes = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
        out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.full(sizes, float("-inf"), dtype=q.dtype)
        for row, a, b in self.rows(q, k, more):
            scores = self.one(q[row][a], k[row][b], more)
            own, values = torch.logsumexp(scores, -1), v[row][b]
            shares = (scores - own.unsqueeze(-1)).exp().nan_to_num(0.0)
            found = torch.einsum("hqt,thk->qhk", shares, values.repeat_interleave(q.shape[-2] // k.shape[-2], 1))
            out[row][a] = found
            lse[row][:, a] = own
        return out, lse, None, None, None

    def _flash_attn_bwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, softmax_scale: float,
        window_size_left: int | None, window_size_right: int | None, deterministic: bool, dq: Tensor, dk: Tensor, dv: Tensor,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> Any:  # fmt: skip
        more = {name: value for name, value in locals().items() if name not in ("self", "q", "k", "v", "out", "dout", "lse")}
        self.calls.append(more)
        for x in (dq, dk, dv):
            x.zero_()
        for row, a, b in self.rows(q, k, more):
            qs, ks, vs, result, grad, log, *wanted = (x[row] for x in (q, k, v, out, dout, lse, dq, dk, dv))
            qs, ks, vs, result, grad, log = qs[a], ks[b], vs[b], result[a], grad[a], log[:, a]
            wide = [x.repeat_interleave(qs.shape[1] // ks.shape[1], 1) for x in (ks, vs)]
            shares = (self.one(qs, ks, more) - log.masked_fill(log == float("-inf"), 0.0).unsqueeze(-1)).exp()
            pulled = torch.einsum("qhk,thk->hqt", grad, wide[1]) - (grad * result).sum(-1).t().unsqueeze(-1)
            scores = shares * pulled * softmax_scale
            wanted[0][a] = torch.einsum("hqt,thk->qhk", scores, wide[0])
            for x, found in ((1, torch.einsum("hqt,qhk->thk", scores, qs)), (2, torch.einsum("hqt,qhk->thk", shares, grad))):
                wanted[x][b] = found.unflatten(1, (ks.shape[1], -1)).sum(2)
        return dq, dk, dv


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Generator[Package]:
    stand_in = Package()
    monkeypatch.setattr(flash4, "_package", lambda: stand_in)
    with torch.library._scoped_library("mtl_flash4", "IMPL") as library:  # type: ignore[attr-defined]
        library.impl("flash4_attention", flash4.launch_forward, "CPU")
        library.impl("flash4_attention_backward", flash4.launch_backward, "CPU")
        yield stand_in


MASKS = {
    "causal": (Mask(), 9, 9),
    "window": (Mask(window=3), 9, 9),
    "all": (Mask(causal=False), 9, 7),
    "window_alone": (Mask(causal=False, window=2), 9, 9),
    "at_the_end": (Mask(offset=4), 5, 9),
    "before": (Mask(offset=9), 4, 9),
    "window_before": (Mask(window=7, offset=6), 4, 5),
    "later": (Mask(offset=6), 5, 9),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_in_the_packages_words(package: Package, name: str) -> None:
    mask, queries, keys = MASKS[name]
    q, k, v = qkv(queries, keys, 4, 2)
    want = KERNELS["plain"].forward(q, k, v, mask, None, 0.3)
    close(flash4.forward(q, k, v, mask, None, 0.3), want)
    pull, lse = draw(5, *q.shape), torch.logaddexp(want[1], draw(6, *want[1].shape))  # of more keys, as in a ring
    args = (pull, q, k, v, want[0], lse, mask, None, 0.3)
    close(flash4.backward(*args), KERNELS["plain"].backward(*args))
    assert len(package.calls) == 2 and package.calls[1]["deterministic"] is False


@pytest.mark.parametrize("name", WITHIN)
def test_documents_in_the_packages_words(package: Package, name: str) -> None:
    mask, (q_start, q_stop), (k_start, k_stop) = WITHIN[name]
    q, k, v = qkv(q_stop - q_start, k_stop - k_start, 4, 2)
    documents = Documents(within(q_start, q_stop), within(k_start, k_stop))
    want = KERNELS["plain"].forward(q, k, v, mask, documents, 0.3)
    got = flash4.forward(q, k, v, mask, documents, 0.3)
    close(got[0], want[0])
    assert torch.equal(got[1] == float("-inf"), want[1] == float("-inf"))
    close(got[1].nan_to_num(neginf=0.0), want[1].nan_to_num(neginf=0.0))
    pull, lse = draw(5, *q.shape), torch.logaddexp(want[1], draw(6, *want[1].shape))
    args = (pull, q, k, v, want[0], lse, mask, documents, 0.3)
    close(flash4.backward(*args), KERNELS["plain"].backward(*args))


def test_a_deterministic_run_asks_the_package_for_it(package: Package) -> None:
    q, k, v = qkv(9, 9, 4, 2)
    out, lse = flash4.forward(q, k, v, Mask(), None, 0.3)
    torch.use_deterministic_algorithms(True)
    try:
        flash4.backward(q, q, k, v, out, lse, Mask(), None, 0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert package.calls[-1]["deterministic"] is True


def test_a_compiled_step_calls_the_operations(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KERNELS", {**KERNELS, "flash4": KERNELS["flash4"]._replace(refuses=lambda *_: None)})
    fused, grad = draw(1, 2, 9, 8, 8).float(), draw(2, 2, 9, 4, 8).float()

    def step(impl: str) -> Any:
        def run(fused: Tensor, grad: Tensor) -> Any:
            q, k, v = (fused * 2.0).split((4, 2, 2), 2)  # views, as of a projection to all three
            found: Any = vjp(lambda q, k, v: attend(q, k, v, Mask(), None, 0.3, impl), q, k, v)
            out, pull = found
            return out, torch.cat(pull(grad), 2)

        return run

    got = compiled(step("flash4"))(fused, grad)
    assert len(package.calls) == 2, "the package is not called while the step is traced"
    for a, b in zip(got, step("plain")(fused, grad), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_shapes_and_layouts_are_told_as_they_are(package: Package) -> None:
    q, k, v = (draw(0, 2, 9, 8, 8).float()).split((4, 2, 2), 2)
    cuts = torch.tensor([0, 5, 9, 18], dtype=torch.int32)
    turned, joined = ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)], [x.flatten(0, 1) for x in (q, k, v)])
    for tensors, lengths in (([q, k, v], (None, None)), (turned, (None, None)), (joined, (cuts, cuts))):
        args = (*tensors, *lengths, 9, 9, None, 0, 0.3)
        more = (tensors[0], *tensors, *OPS.flash4_attention(*args), *lengths, 9, 9, None, 0, 0.3, True)
        tests = ("test_schema", "test_faketensor")
        for op, given in ((OPS.flash4_attention, args), (OPS.flash4_attention_backward, more)):
            found = torch.library.opcheck(op.default, given, test_utils=tests)
            assert found == dict.fromkeys(tests, "SUCCESS")
            meta = op(*(x.to("meta") if isinstance(x, Tensor) else x for x in given))
            assert [x.stride() for x in op(*given)] == [x.stride() for x in meta]
    q, k = (torch.empty(2, 9, n, 8, dtype=torch.bfloat16, device="meta") for n in (4, 2))
    out, lse = flash4.forward(q, k, k, Mask(), None, 0.3)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 9, 4, 8), torch.bfloat16, (2, 4, 9), torch.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": "cpu"}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float32}, "needs bfloat16 or float16, not torch.float32"),
        ({"installed": False}, "needs the flash-attn-4 package: pip install flash-attn-4"),
        ({"capability": 8}, "needs an NVIDIA device of compute capability 9 or 10, not 8"),
        ({"capability": 0}, "needs an NVIDIA device of compute capability 9 or 10, not 0"),
        ({"size": 100}, "needs a head size up to 256 and divisible by 8, not 100"),
        ({"size": 136, "capability": 10}, "needs a head size up to 128 and divisible by 8, not 136"),
        ({"mask": Mask(window=3, offset=8)}, "has no windows that begin or end before"),
        ({"mask": Mask(offset=-3)}, "has no windows that begin or end before"),
        ({"mask": Mask(offset=-3), "documents": True}, "has no document masks for queries that end elsewhere than the keys"),
        ({"problem": "needs more", "capability": 9}, "needs more"),
        ({"size": 256, "capability": 9}, None),
        ({"mask": Mask(window=3)}, None),
        ({"documents": True}, None),
    ],
)
def test_what_it_refuses(change: dict[str, Any], says: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "installed", lambda: change.get("installed", True))
    monkeypatch.setattr(flash4, "capability", lambda device: change.get("capability"))
    monkeypatch.setattr(flash4, "problem", lambda: change.get("problem"))
    kinds = {"dtype": change.get("dtype", torch.bfloat16), "device": change.get("device", "meta")}
    q, k = (torch.empty(2, 8, n, change.get("size", 128), **kinds) for n in (4, 2))
    ends = torch.tensor([[3, 8], [8, 8]], dtype=torch.int32)
    documents = Documents(ends, ends) if change.get("documents") else None
    if says is None:
        assert choose("flash4", q, k, change.get("mask", Mask()), documents) is KERNELS["flash4"]
        return
    with pytest.raises(UserError, match=f"attention impl 'flash4' {says}"):
        choose("flash4", q, k, change.get("mask", Mask()), documents)


def test_flash_attention_2_refuses_windows_that_it_takes_for_others() -> None:
    """With 600 queries, 500 keys and Mask(window=700, offset=500) its result was 10 % off on an H200."""
    q, k = (torch.empty(1, n, 4, 64, dtype=torch.bfloat16, device="meta") for n in (600, 500))
    for mask in (Mask(window=700, offset=500), Mask(offset=450), Mask(causal=False, window=300), Mask(window=700, offset=-200)):
        assert "sees other keys" in (KERNELS["flash"].refuses(q, k, mask, None) or ""), mask
    for queries, keys, mask in ((q, q, Mask()), (q, q, Mask(window=9)), (k, q, Mask(offset=100)), (q, k, Mask(offset=-100))):
        assert KERNELS["flash"].refuses(queries, keys, mask, None) is None


def test_it_is_the_first_choice_where_it_works(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 8, 4, 128, dtype=torch.bfloat16, device="meta")
    assert choose("auto", q, q, Mask(), None) is KERNELS["flash4" if flash4.installed() else "cudnn"]
    monkeypatch.setattr(flash4, "installed", lambda: True)
    assert choose("auto", q, q, Mask(), None) is KERNELS["flash4"]
    assert choose("auto", q[..., :64], q[..., :64], Mask(), None) is KERNELS["flash4"]
    narrow = q[..., :56]
    assert choose("auto", narrow, narrow, Mask(), None) is KERNELS["cudnn"]
    assert choose("auto", narrow, narrow, Mask(window=3), None) is KERNELS["flash4"], "cuDNN has no windows here"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose("auto", q, q, Mask(), None) is KERNELS["flash4"]
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(flash4, "capability", lambda device: 9)
    assert choose("auto", q, q, Mask(window=3), None) is KERNELS["flash4"]
    monkeypatch.setattr(flash4, "problem", lambda: "needs more")
    assert choose("auto", q, q, Mask(), None) is KERNELS["cudnn"]
    with pytest.raises(UserError, match="'flash4' needs more"):
        choose("flash4", q, q, Mask(), None)


def test_a_prompt_waits_for_no_package(one: Callable[..., Parallel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes 6 s, and a prompt is read once."""
    taken: list[tuple[int, ...]] = []

    def forward(q: Tensor, *rest: Any) -> Any:
        taken.append(tuple(q.shape))
        return KERNELS["plain"].forward(q, *rest)

    willing = KERNELS["plain"]._replace(forward=forward, refuses=lambda *_: None)
    monkeypatch.setattr(attention, "KERNELS", {**KERNELS, "flash4": willing})
    config, par = MODELS["llama"], one()
    params = init(decoder.specs(config), par.rules, par.mesh, 0, torch.float32)
    for impl, used in (("auto", False), ("flash4", True)):
        said = dataclasses.replace(config, attention_impl=impl)
        list(generate(decoder, said, par.mesh, par.rules, PRECISIONS["fp32"], params, [[5, 6, 7]], 2))
        assert bool(taken) == used
    q = torch.empty(1, 8, 4, 64)
    assert choose("auto", q, q, Mask(), None) is willing


def test_a_package_that_does_not_suit_is_refused(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = flash4.problem.__wrapped__
    assert problem() is None
    monkeypatch.setattr(flash4, "_package", lambda: SimpleNamespace(_flash_attn_fwd=Package._flash_attn_fwd))  # pyright: ignore
    assert "the _flash_attn_bwd of this one has no q, k, v, cu_seqlens_q" in (problem() or "")
    monkeypatch.setattr(flash4, "_package", lambda: importlib.import_module("no_such_package"))
    assert "this one says ModuleNotFoundError" in (problem() or "")


def test_there_is_no_second_derivative(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KERNELS", {**KERNELS, "flash4": KERNELS["flash4"]._replace(refuses=lambda *_: None)})
    q, k, v = qkv(9, 9, 4, 2)

    def slope(q: Tensor) -> Tensor:
        return grad(lambda q: attend(q, k, v, Mask(), None, 0.3, "flash4").square().sum())(q).square().sum()

    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad(slope)(q)


def test_each_package_is_told_from_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 puts a folder ``cute`` into a folder ``flash_attn`` that is no package; flash-attn has a package of that name."""
    q = torch.empty(1, 8, 4, 64, dtype=torch.bfloat16, device="meta")
    (tmp_path / "four/flash_attn/cute").mkdir(parents=True)
    (tmp_path / "four/flash_attn_4-4.0.0.dist-info").mkdir()
    (tmp_path / "four/flash_attn_4-4.0.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0\n")
    (tmp_path / "two/flash_attn").mkdir(parents=True)
    (tmp_path / "two/flash_attn/__init__.py").touch()
    found: dict[str, tuple[bool, bool]] = {}
    path = list(sys.path)
    for name in ("none", "four", "two"):
        monkeypatch.setattr(sys, "path", [str(tmp_path / name), *path])
        flash4.installed.cache_clear()
        said = [KERNELS[impl].refuses(q, q, Mask(), None) or "" for impl in ("flash_attn", "flash4")]
        found[name] = ("needs the flash-attn package" not in said[0], "needs the flash-attn-4 package" not in said[1])
    flash4.installed.cache_clear()
    if found["none"] != (False, False):
        pytest.skip("one of the packages is installed here")
    assert found == {"none": (False, False), "four": (False, True), "two": (True, False)}


def test_operations_are_counted_as_other_kernels() -> None:
    assert kind_of("flash4_attention", True) == kind_of("flash4_attention_backward", True) == "attention"
    q, k = (torch.empty(2, 9, n, 8, device="meta") for n in (4, 2))
    given = SimpleNamespace(whole=[q, k, k], joined=[x.flatten(0, 1) for x in (q, k, k)])
    pairs = {(None, 0): 45, (2, 0): 3 * 9 - 3, (None, None): 81}
    for tensors in (given.whole, given.joined):
        for window, count in pairs.items():
            args = (*tensors, None, None, 9, 9, *window, 0.3)
            assert attention_flops("flash4_attention", args, {}) == 4 * 2 * 4 * 8 * count
            more = (tensors[0], *tensors, tensors[0], None, None, None, 9, 9, *window, 0.3, False)
            assert attention_flops("flash4_attention_backward", more, {}) == 10 * 2 * 4 * 8 * count


GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or not flash4.installed() or flash4.capability(torch.device("cuda")) not in flash4.LARGEST,
    reason="needs a Hopper or Blackwell GPU and flash-attn-4",
)


@GPU
@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("name", ["causal", "window", "all"])
def test_the_package_against_the_plain_kernel(name: str, documents: bool) -> None:
    torch.manual_seed(0)
    mask = {"causal": Mask(), "window": Mask(window=100), "all": Mask(causal=False)}[name]
    q, k, v, grad = (torch.randn(2, 1000, n, 128, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2, 8))
    ends = torch.tensor([[10, 300, 300, 1000], [513, 514, 1000, 1000]], device="cuda", dtype=torch.int32)
    held = Documents(ends, ends) if documents else None

    def run(impl: str, *given: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given[:3]]
        out = attend(leaves[0], leaves[1], leaves[2], mask, held, 128**-0.5, impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]

    want = run("plain", *(x.float() for x in (q, k, v, grad)))
    for a, b in zip(run("flash4", q, k, v, grad), want, strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()


@GPU
def test_the_package_repeats_its_bits_where_it_must() -> None:
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 2048, n, 128, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2, 8))
    out, lse = flash4.forward(q, k, v, Mask(), None, 128**-0.5)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [flash4.backward(grad, q, k, v, out, lse, Mask(), None, 128**-0.5) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
