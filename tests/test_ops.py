"""Every operation against torch's own or an independent formula, in float64: values, gradients, and what it must refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mtl import tree
from mtl.errors import UserError
from mtl.kernels import flash4, ordered
from mtl.kernels.attention import KERNELS, attend, choose
from mtl.kernels.masks import Documents, Mask
from mtl.ops import cross_entropy as head
from mtl.ops.attention import attention
from mtl.ops.cross_entropy import cross_entropy, next_token_logits
from mtl.ops.dropout import dropout
from mtl.ops.embedding import embedding
from mtl.ops.linear import linear
from mtl.ops.norm import layer_norm, rms_norm
from mtl.ops.remat import remat
from mtl.ops.rotary import angles, rotate
from mtl.sharding.parallel import Parallel
from mtl.train.gradient import value_and_grad
from tests.compare import close, same

One = Callable[..., Parallel]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def grads(out: Any, inputs: Any, seed: int = 99) -> Any:
    """Pull random numbers of the result's shape back to the inputs."""
    return torch.autograd.grad(out, inputs, draw(seed, *out.shape, dtype=out.dtype).detach())


# ---------------------------------------------------------------- attention

MASKS = {
    "whole": (Mask(causal=False), 9, 9),
    "causal": (Mask(), 9, 9),
    "window": (Mask(window=3), 9, 9),
    "window_alone": (Mask(causal=False, window=4), 9, 9),
    "window_of_all": (Mask(window=9), 9, 9),
    "queries_at_the_end": (Mask(offset=5), 4, 9),
    "queries_in_the_middle": (Mask(offset=2), 4, 9),
    "queries_after_all_keys": (Mask(offset=8), 3, 9),
    "window_and_offset": (Mask(window=4, offset=5), 4, 9),
}
ON_CPU = {"whole", "causal", "window_of_all", "queries_after_all_keys"}


def allowed(mask: Mask, queries: int, keys: int, numbers: Tensor | None = None) -> Tensor:
    """Draw the mask pair by pair, (1 or B, 1, Q, T)."""
    pairs = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            at = i + mask.offset
            pairs[..., i, j] = (j <= at or not mask.causal) and (mask.window is None or j > at - mask.window)
    return pairs if numbers is None else pairs & (numbers[:, None, -queries:, None] == numbers[:, None, None, :keys])


def reference(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale, enable_gqa=True).transpose(1, 2)


def qkv(queries: int, keys: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(1, 2, queries, heads, 8), draw(2, 2, keys, kv_heads, 8), draw(3, 2, keys, kv_heads, 8)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("impl", ["plain", "cpu"])
def test_attention_kernels_equal_torch(impl: str, name: str, kv_heads: int) -> None:
    mask, queries, keys = MASKS[name]
    inputs = qkv(queries, keys, 4, kv_heads)
    if impl == "cpu" and name not in ON_CPU:
        with pytest.raises(UserError, match="attention impl 'cpu' has neither windows"):
            attend(*inputs, mask, None, 0.3, impl)
        return
    got, want = attend(*inputs, mask, None, 0.3, impl), reference(*inputs, allowed(mask, queries, keys), 0.3)
    close(got, want)
    close(grads(got, inputs), grads(want, inputs))


NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 3, 3]])
ENDS = torch.tensor([[3, 5, 9, 9], [1, 7, 9, 9]], dtype=torch.int32)


def test_document_masks() -> None:
    inputs = qkv(9, 9, 4, 2)
    for impl in ("plain", "cpu"):
        for mask in (Mask(), Mask(window=3)):
            got = attend(*inputs, mask, Documents(ENDS, ENDS), 0.3, impl)
            want = reference(*inputs, allowed(mask, 9, 9, NUMBERS), 0.3)
            close(got, want)
            close(grads(got, inputs), grads(want, inputs))


@pytest.mark.parametrize("impl", ["plain", "cpu"])
def test_kernel_pairs_equal_autograd(impl: str) -> None:
    """The plain forward is differentiable torch, so autograd through it is what every backward must give; so too its logsumexp."""
    q, k, v = qkv(9, 9, 4, 2)
    for mask in [Mask(), Mask(causal=False)] + [Mask(window=3)] * (impl == "plain"):
        out, lse = KERNELS["plain"].forward(q, k, v, mask, None, 0.3)
        got, got_lse = KERNELS[impl].forward(q, k, v, mask, None, 0.3)
        close((got, got_lse), (out, lse))
        g = draw(4, *out.shape).detach()
        close(KERNELS[impl].backward(g, q, k, v, got, got_lse, mask, None, 0.3), torch.autograd.grad(out, (q, k, v), g))


@pytest.mark.parametrize("impl", ["plain", "cpu"])
def test_kernel_pairs_join_over_keys(impl: str) -> None:
    """What a ring does: blocks of keys joined by their logsumexp, and backward block by block from the joined results."""
    q, k, v = (x.detach() for x in qkv(4, 8, 4, 2))
    blocks = [(slice(0, 4), Mask(causal=False)), (slice(4, 8), Mask())]
    parts = [KERNELS[impl].forward(q, k[:, b], v[:, b], mask, None, 0.3) for b, mask in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * (part - lse).exp().transpose(1, 2).unsqueeze(-1) for o, part in parts)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = reference(*leaves, allowed(Mask(offset=4), 4, 8), 0.3)
    close(out, want)
    g = draw(4, *out.shape).detach()
    pulled = [KERNELS[impl].backward(g, q, k[:, b], v[:, b], out, lse, mask, None, 0.3) for b, mask in blocks]
    together = (pulled[0][0] + pulled[1][0], torch.cat([p[1] for p in pulled], 1), torch.cat([p[2] for p in pulled], 1))
    close(together, torch.autograd.grad(want, leaves, g))


def test_rows_that_see_nothing_are_zero() -> None:
    inputs, mask = qkv(4, 5, 4, 2), Mask(offset=-2)
    out, lse = KERNELS["plain"].forward(*inputs, mask, None, 0.3)
    assert (out[:, :2] == 0).all() and (lse[..., :2] == float("-inf")).all() and lse[..., 2:].isfinite().all()
    got, want = attend(*inputs, mask, None, 0.3, "plain"), reference(*inputs, allowed(mask, 4, 5), 0.3)
    close(got[:, 2:], want[:, 2:])
    dq, dk, dv = grads(got, inputs)
    assert (dq[:, :2] == 0).all()
    g = draw(99, *got.shape).detach()[:, 2:]
    want_dq, want_dk, want_dv = torch.autograd.grad(want[:, 2:], inputs, g)
    close((dq[:, 2:], dk, dv), (want_dq[:, 2:], want_dk, want_dv))


@pytest.mark.parametrize("window", [None, 3, 5])
def test_queries_in_pieces_see_what_they_saw_whole(window: int | None) -> None:
    inputs = q, k, v = qkv(12, 12, 4, 2)
    whole = attend(q, k, v, Mask(True, window), None, 0.3, "plain")
    cut = torch.cat([attend(q[:, c : c + 4], k, v, Mask(True, window, c), None, 0.3, "plain") for c in (0, 4, 8)], 1)
    close(cut, whole)
    close(grads(cut, inputs), grads(whole, inputs))


@settings(deadline=None)
@given(st.booleans(), st.none() | st.integers(1, 9), st.integers(-9, 9), st.integers(1, 6), st.integers(1, 6))
def test_masks_know_when_they_are_trivial_or_empty(causal: bool, window: int | None, offset: int, queries: int, keys: int) -> None:
    mask = Mask(causal, window, offset)
    pairs = allowed(mask, queries, keys)[0, 0]
    assert torch.equal(mask.pairs(queries, keys, pairs.device), pairs)
    assert mask.trivial(queries, keys) == bool(pairs.all())
    assert mask.empty(queries, keys) == (not pairs.any())


def test_the_fastest_kernel_that_can_is_chosen() -> None:
    q, k, _ = qkv(9, 9, 4, 2)
    ends = torch.full((2, 8), 9, dtype=torch.int32)
    assert choose("auto", q, k, Mask(), None) is KERNELS["cpu"]
    assert choose("auto", q, k, Mask(window=3), None) is KERNELS["plain"]
    assert choose("auto", q, k, Mask(window=3), Documents(ends, ends)) is KERNELS["cpu"]
    with pytest.raises(UserError, match="Did you mean 'plain'"):
        choose("plan", q, k, Mask(), None)
    with pytest.raises(UserError, match="'flash' needs a CUDA device, not cpu"):
        choose("flash", q, k, Mask(), None)


def test_deterministic_runs_add_up_gradients_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 256, 4, 64, dtype=torch.bfloat16, device="meta")  # stands for a GPU's
    monkeypatch.setattr(flash4, "installed", lambda: False)
    assert choose("auto", q, q, Mask(), None) is KERNELS["cudnn"]
    calls: list[bool] = []
    real = ordered.queries
    monkeypatch.setattr(ordered, "queries", lambda *args: calls.append(args[-2]) or real(*args))
    lse = torch.empty(1, 4, 256, device="meta")
    torch.use_deterministic_algorithms(True)
    try:
        monkeypatch.setattr(ordered, "refuses", lambda: None)
        kernel = choose("auto", q, q, Mask(), None)
        assert kernel is KERNELS["cudnn"]
        grads = kernel.backward(q, q, q, q, q, lse, Mask(), None, 0.125)
        assert calls == [True] and [g.shape for g in grads] == [q.shape] * 3
        monkeypatch.setattr(ordered, "refuses", lambda: "needs something else")
        assert choose("auto", q, q, Mask(), None) is KERNELS["flash"]
        with pytest.raises(UserError, match="deterministic is on"):
            choose("cudnn", q, q, Mask(), None)
    finally:
        torch.use_deterministic_algorithms(False)


CASES = [(2, 200, 200, 4, 2, 64, True), (1, 1000, 1000, 8, 2, 128, True), (2, 300, 400, 4, 4, 80, False), (1, 70, 70, 6, 2, 96, True)]


GPU = pytest.param("kernel", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("kind", ["meaning", GPU])
@pytest.mark.parametrize("case", CASES)
def test_the_ordered_gradient_of_queries_is_autograds(case: tuple[int, ...], kind: str) -> None:
    batch, queries, length, heads, groups, size, causal = case
    torch.manual_seed(0)
    device = "cuda" if kind == "kernel" else "cpu"
    q, grad = (torch.randn(batch, queries, heads, size, device=device) for _ in range(2))
    k, v = (torch.randn(batch, length, groups, size, device=device) for _ in range(2))
    mask = Mask(causal=bool(causal))
    if kind == "kernel":
        q, grad, k, v = (x.bfloat16() for x in (q, grad, k, v))
    wide = [x.double() for x in (grad, q, k, v)]
    out, lse = KERNELS["plain"].forward(*wide[1:], mask, None, size**-0.5)
    want = KERNELS["plain"].backward(*wide, out, lse, mask, None, size**-0.5)[0]
    got = ordered.queries(grad, q, k, v, out.to(q.dtype), lse.float(), bool(causal), size**-0.5)
    assert got.dtype == q.dtype and (got.double() - want).abs().max() <= (2e-2 if kind == "kernel" else 1e-5) * want.abs().max()
    again = ordered.queries(grad, q, k, v, out.to(q.dtype), lse.float(), bool(causal), size**-0.5)
    assert torch.equal(got, again)
    if kind == "meaning":
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.func.grad(lambda q: ordered.queries(grad, q, k, v, out.to(q.dtype), lse.float(), bool(causal), 1.0).sum())(q)


@pytest.mark.parametrize(
    ("impl", "window", "documents"), [("auto", None, False), ("cpu", None, False), ("plain", 4, True), ("auto", 4, True)]
)
def test_attention_of_a_model(one: One, impl: str, window: int | None, documents: bool) -> None:
    par = one(heads=4, core_heads=4, kv_heads=2, core_kv_heads=2)
    inputs = qkv(9, 9, 4, 2)
    got = attention(par, *inputs, window, ENDS if documents else None, impl)
    pairs = allowed(Mask(window=window), 9, 9, NUMBERS if documents else None)
    want = reference(*inputs, pairs, 8**-0.5)
    close(got, want)
    close(grads(got, inputs), grads(want, inputs))


# ---------------------------------------------------------------- norms


def test_rms_norm() -> None:
    x, w = draw(0, 3, 5, 16), draw(1, 16)
    got, want = rms_norm(x, w, 1e-3), F.rms_norm(x, (16,), w, 1e-3)
    close(got, want)
    close(grads(got, (x, w)), grads(want, (x, w)))


def test_layer_norm() -> None:
    x, w, b = draw(0, 3, 5, 16), draw(1, 16), draw(2, 16)
    got, want = layer_norm(x, w, b, 1e-3), F.layer_norm(x, (16,), w, b, 1e-3)
    close(got, want)
    close(got, (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt() * w + b)
    close(grads(got, (x, w, b)), grads(want, (x, w, b)))
    close(layer_norm(x, w, None, 1e-3), F.layer_norm(x, (16,), w, None, 1e-3))


def test_norms_of_16_bit_numbers_are_computed_in_float32() -> None:
    x, w = draw(0, 64, 16).detach(), draw(1, 16).detach()
    short = (x * 20 + 300).to(torch.bfloat16)  # a mean far from 0: variance in bfloat16 would be noise
    assert torch.equal(rms_norm(short, w, 1e-5), F.rms_norm(short.float(), (16,), w.float(), 1e-5).to(torch.bfloat16))
    assert torch.equal(layer_norm(short, w, w, 1e-5), F.layer_norm(short.float(), (16,), w.float(), w.float(), 1e-5).to(torch.bfloat16))


# ---------------------------------------------------------------- rotary


def exact_angles(positions: Tensor, head_size: int, theta: float) -> Tensor:
    return positions.double().unsqueeze(-1) * theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rotary_is_a_rotation_of_complex_numbers(pairs: str) -> None:
    x, positions = draw(0, 2, 5, 3, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 0, 100, 3, 9]])
    angle = exact_angles(positions, 8, 50.0)
    got = rotate(x, angle.cos(), angle.sin(), pairs)
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(-2)
    if pairs == "half":
        turned = torch.complex(x[..., :4], x[..., 4:]) * turn
        want = torch.cat((turned.real, turned.imag), -1)
    else:
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn
        want = torch.view_as_real(turned).flatten(-2)
    close(got, want)
    close(grads(got, x), grads(want, x))
    assert same(got[0, 0], x[0, 0]), "position 0 does not turn"


def test_angles_are_right_to_float32s_precision() -> None:
    positions = torch.tensor([[0, 1, 5, 63, 2047], [9, 8, 2, 0, 31]])
    cos, sin = angles(positions, 16, 10000.0)
    exact = exact_angles(positions, 16, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (2, 5, 8)
    # Roundings: the exponent (times log theta), the power, its inverse, the product; and one of the cosine itself.
    bound = 2.0**-24 * (exact * (9.3 + 3) + 2)
    assert ((cos - exact.cos()).abs() <= bound).all() and ((sin - exact.sin()).abs() <= bound).all()


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_dot_products_depend_on_the_distance_alone(pairs: str) -> None:
    q, k = draw(0, 1, 1, 1, 16).detach(), draw(1, 1, 1, 1, 16).detach()

    def dot(i: int, j: int) -> Tensor:
        turned = []
        for x, at in ((q, i), (k, j)):
            angle = exact_angles(torch.tensor([[at]]), 16, 100.0)
            turned.append(rotate(x, angle.cos(), angle.sin(), pairs))
        return (turned[0] * turned[1]).sum()

    close([dot(9 + s, 4 + s) for s in (1, 17, 300)], [dot(9, 4)] * 3)
    assert abs(dot(9, 5) - dot(9, 4)) > 1e-3, "and the distance matters"


# ---------------------------------------------------------------- embedding and linear


def test_embedding(one: One) -> None:
    table, tokens = draw(0, 11, 6), torch.tensor([[3, 3, 0], [10, 1, 3]])
    got, want = embedding(one(vocab=11, embed=6), tokens, table, torch.float64), F.embedding(tokens, table)
    assert same(got, want)
    close(grads(got, table), grads(want, table))
    assert embedding(one(vocab=11, embed=6), tokens, table, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("spelling", "left", "right", "bias", "einsum"),
    [
        ("BSD,DHK->BSHK", (2, 5, 6), (6, 4, 3), (4, 3), "bsd,dhk->bshk"),
        ("BSHK,DHK->BRD", (2, 5, 4, 3), (6, 4, 3), (6,), "bshk,dhk->bsd"),
        ("BSD,DF->BSF", (2, 5, 6), (6, 7), (7,), "bsd,df->bsf"),
        ("BSF,DF->BRD", (2, 5, 7), (6, 7), (6,), "bsf,df->bsd"),
        ("BSD,VD->BSV", (2, 5, 6), (11, 6), None, "bsd,vd->bsv"),
    ],
)
def test_linear_is_an_einsum(one: One, spelling: str, left: Any, right: Any, bias: Any, einsum: str) -> None:
    par = one(embed=6, heads=4, head=3, mlp=7, vocab=11)
    inputs = [draw(0, *left), draw(1, *right)] + ([draw(2, *bias)] if bias else [])
    got = linear(par, spelling, *inputs)
    want = torch.einsum(einsum, *inputs[:2]) + (inputs[2] if bias else 0.0)
    close(got, want)
    close(grads(got, inputs), grads(want, inputs))


@pytest.mark.parametrize("spelling", ["BDS,DF->BSF", "BSD,HDK->BSHK", "BSHK,DKH->BRD", "BSD,FK->BSFK"])
def test_a_product_that_linear_cannot_spell_is_refused(one: One, spelling: str) -> None:
    with pytest.raises(ValueError, match="cannot spell"):
        linear(one(), spelling, draw(0, 2, 5, 6), draw(1, 6, 7))


# ---------------------------------------------------------------- cross-entropy

TOKENS, WIDTH, VOCAB = (3, 7), 6, 11


def losses(par: Parallel, impl: str, letters: str, z_loss: float) -> tuple[Any, Any, list[Tensor]]:
    """Give (ours, torch's, inputs), each as loss and plain entropy."""
    rng = torch.Generator().manual_seed(5)
    x, w = draw(0, *TOKENS, WIDTH), draw(1, *((WIDTH, VOCAB) if letters == "DV" else (VOCAB, WIDTH)))
    targets = torch.randint(0, VOCAB, TOKENS, generator=rng)
    weights = (torch.rand(TOKENS, generator=rng) < 0.6).double() * torch.rand(TOKENS, generator=rng, dtype=torch.float64)
    assert 0 < (weights == 0).sum() < weights.numel()
    logits = x @ (w if letters == "DV" else w.t())
    entropy = (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") * weights.flatten()).sum()
    want = entropy + z_loss * (logits.logsumexp(-1).square() * weights).sum()
    return cross_entropy(par, letters, x, w, targets, weights, z_loss, impl), (want, entropy), [x, w]


@pytest.mark.parametrize("tile", [4096, 5, 21])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("letters", ["DV", "VD"])
@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_cross_entropy(one: One, monkeypatch: pytest.MonkeyPatch, impl: str, letters: str, z_loss: float, tile: int) -> None:
    monkeypatch.setattr(head, "LOGITS", tile * VOCAB * 8)
    got, want, inputs = losses(one(vocab=VOCAB, embed=WIDTH), impl, letters, z_loss)
    close(got, want)
    close(torch.autograd.grad(got[0] * 0.37, inputs), torch.autograd.grad(want[0] * 0.37, inputs))


def test_fused_cross_entropy_keeps_to_its_tiles(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            shapes = [x.shape for x in tree.leaves(out) if isinstance(x, Tensor)]
            self.most = max([self.most, *(s.numel() // VOCAB for s in shapes if s[-1:] == (VOCAB,) and s != (WIDTH, VOCAB))])
            return out

    monkeypatch.setattr(head, "LOGITS", 5 * VOCAB * 8)
    x, w = draw(0, *TOKENS, WIDTH), draw(1, WIDTH, VOCAB)
    targets, weights = torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS)
    found = {}
    for impl in ("plain", "fused"):
        with Rows() as rows:
            cross_entropy(one(vocab=VOCAB, embed=WIDTH), "DV", x, w, targets, weights, impl=impl)[0].backward()
        found[impl] = rows.most
    assert found == {"plain": 21, "fused": 5}


def test_gradients_that_the_head_has_finished_are_not_written_again(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss's scale is in them from the first, and a head that does not travel takes the gradient as it was summed."""
    monkeypatch.setattr(head, "LOGITS", 5 * VOCAB * 2)
    par, found = one(vocab=VOCAB, embed=WIDTH), {}

    def loss(params: Any, batch: Any) -> Any:
        return cross_entropy(par, "DV", batch["x"], params["w"], batch["targets"], batch["weights"], impl="fused")

    def late(params: Any, batch: Any) -> Any:
        return tuple(0.3 * part for part in loss(params, batch))

    batch = {"x": draw(0, *TOKENS, WIDTH).bfloat16(), "targets": torch.zeros(TOKENS, dtype=torch.int64), "weights": torch.ones(TOKENS)}
    for fn in (loss, late):

        def look(graph: Any, _: Any, fn: Any = fn) -> Any:
            joint_graph_passes(graph)
            made = [str(n.target) for n in graph.graph.nodes if getattr(n.meta.get("val"), "shape", ()) == (WIDTH, VOCAB)]
            found[fn] = [name for name in made if any(part in name for part in ("mul", "copy", "convert"))]
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=look, decompositions=select_decomp_table())
        value_and_grad(fn, "step", backend)({"w": draw(1, WIDTH, VOCAB).float()}, batch, torch.tensor(0.37))
    assert len(found[loss]) == 1, "the head is cast to the type of compute"
    assert len(found[late]) == 2, "a scale that comes late is not"


def test_logits_and_unknown_losses(one: One) -> None:
    par, x, w = one(vocab=VOCAB, embed=WIDTH), draw(0, *TOKENS, WIDTH), draw(1, WIDTH, VOCAB)
    close(next_token_logits(par, "DV", x, w), x @ w)
    with pytest.raises(UserError, match="Did you mean 'fused'"):
        cross_entropy(par, "DV", x, w, torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS), impl="fusd")


# ---------------------------------------------------------------- remat


def layers(calls: list[int], args: dict[str, Any], more: tuple[Any, ...]) -> Tensor:
    calls.append(1)
    x = args["x"][args["rows"]]
    for _ in range(6):
        x = (x @ args["w"]).tanh() * more[0]
    return x + more[1]


def test_remat_gives_the_same_gradients_and_computes_again() -> None:
    leaves = x, w, b = [draw(0, 4, 8), draw(1, 8, 8), draw(2, 8)]
    rows, calls = torch.tensor([3, 0, 0]), list[int]()
    kept: dict[str, int] = {}
    results = {}
    for name, wrap in (("plain", lambda f: f), ("remat", remat)):
        calls.clear()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            out = wrap(lambda a, m: layers(calls, a, m))({"x": x, "w": w, "rows": rows}, (2.0, b))
        assert len(calls) == 1
        results[name] = (out, *grads(out, leaves))
        assert len(calls) == (2 if name == "remat" else 1)
        kept[name] = sum(sizes)
    assert same(results["remat"], results["plain"])
    assert kept["remat"] == 32 + 64 + 8 + 3, "the arguments are kept and nothing else"
    assert kept["plain"] > kept["remat"]


def test_remat_under_functional_gradients() -> None:
    calls: list[int] = []
    rows, x, w, b = torch.tensor([3, 0, 0]), *(t.detach() for t in (draw(0, 4, 8), draw(1, 8, 8), draw(2, 8)))

    def value(wrap: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return wrap(lambda a, m: layers(calls, a, m))({"x": x, "w": w, "rows": rows}, (2.0, b)).square().sum()

    got = torch.func.grad(lambda *a: value(remat, *a), (0, 1, 2))(x, w, b)
    assert len(calls) == 2
    assert same(got, torch.func.grad(lambda *a: value(lambda f: f, *a), (0, 1, 2))(x, w, b))


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_its_share_and_the_mean(rate: float) -> None:
    x = draw(0, 64, 32, 64).detach()
    out = dropout(x, rate, torch.tensor(5), torch.arange(64), torch.arange(32), 32)
    zero = out == 0
    assert abs(zero.double().mean().item() - rate) < 5 * (rate * (1 - rate) / x.numel()) ** 0.5
    close(out[~zero], (x / (1 - rate))[~zero], 1e-15)
    spread = [zero.double().mean(dims) for dims in ((0, 1), (0, 2), (1, 2))]
    for part in spread:  # no row, place or channel is left out
        assert ((part - rate).abs() < 6 * (rate * (1 - rate) * part.numel() / x.numel()) ** 0.5).all()
    assert dropout(x, 0.0, torch.tensor(5), torch.arange(64), torch.arange(32), 32) is x


def test_dropout_does_not_see_how_rows_and_slots_are_cut() -> None:
    x = draw(0, 6, 8, 16).detach()
    whole = dropout(x, 0.3, torch.tensor(5), torch.arange(6), torch.arange(8), 8)
    for rows in ([0, 1, 2], [5, 1], [4]):
        for slots in ([0, 1, 6, 7], [2, 3, 4, 5], [7]):
            part = dropout(x[rows][:, slots], 0.3, torch.tensor(5), torch.tensor(rows), torch.tensor(slots), 8)
            assert same(part, whole[rows][:, slots])


def test_dropout_of_another_key_is_independent() -> None:
    x, rate = torch.ones(64, 32, 64, dtype=torch.float64), 0.3
    masks = [dropout(x, rate, torch.tensor(k), torch.arange(64), torch.arange(32), 32) == 0 for k in (5, 6, 5 + 2**40, -5)]
    agree = rate**2 + (1 - rate) ** 2
    for i in range(4):
        for j in range(i):
            share = (masks[i] == masks[j]).double().mean().item()
            assert abs(share - agree) < 5 * (agree * (1 - agree) / x.numel()) ** 0.5


def test_dropout_passes_gradients_where_it_passes_values() -> None:
    x = draw(0, 6, 8, 16)
    out = dropout(x, 0.3, torch.tensor(5), torch.arange(6), torch.arange(8), 8)
    got = torch.autograd.grad(out.sum(), x)[0]
    assert torch.equal(got == 0, out == 0)
    close(got[got != 0], torch.full_like(got[got != 0], 1 / 0.7), 1e-15)


def test_plain_attention_has_second_derivatives_and_vmap() -> None:
    """Through the Function as through ordinary arithmetic, to the last bits; a batch of them at once too."""
    from torch.func import grad, vmap

    from mtl.kernels import plain

    make = torch.Generator().manual_seed(0)
    q, k, v, weight, direction = (torch.randn(2, 5, 2, 4, dtype=torch.float64, generator=make) for _ in range(5))
    mask = Mask(True, None)

    def twice(run: Any) -> Any:
        first = grad(lambda q, k, v: (run(q, k, v) * weight).sum())
        return grad(lambda q, k, v: (first(q, k, v) * direction).sum(), argnums=(0, 1, 2))(q, k, v)

    got = twice(lambda q, k, v: attend(q, k, v, mask, None, 0.5, "plain"))
    want = twice(lambda q, k, v: plain.forward(q, k, v, mask, None, 0.5)[0])
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()

    def score(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (attend(q.unsqueeze(0), k[:1], v[:1], mask, None, 0.5, "plain")[0] * w).sum()

    each = vmap(grad(score))(q, weight)
    alone = torch.stack([grad(score)(a, w) for a, w in zip(q, weight, strict=True)])
    assert (each - alone).abs().max() <= 1e-13


@pytest.mark.parametrize("letters", ["DV", "VD"])
def test_heads_are_filled_up_on_gpus(one: One, letters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs multiply by a multiple of columns; what is filled up changes neither the loss nor the gradients' shapes and values."""
    seen: list[int] = []
    usual = head.head_logits

    def noted(x: Tensor, w: Tensor, *rest: Any) -> Any:
        seen.append(w.shape[1])
        return usual(x, w, *rest)

    monkeypatch.setattr(head, "head_logits", noted)
    par = one(vocab=101, batch=2, seq=5)
    shapes = [(2, 5, 8), (8, 101) if letters == "DV" else (101, 8)]
    targets, weights = torch.randint(0, 101, (2, 5)), torch.rand(2, 5, dtype=torch.float64)
    on_gpu = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes]  # stands for a GPU's
    cross_entropy(par, letters, *on_gpu, targets.to("meta"), weights.float().to("meta"), impl="fused")
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    found: list[Any] = []
    for fill in (0, 27):
        table = w.t() if letters == "VD" else w
        loss, _ = head._fused(par, x, F.pad(table, (0, fill)), targets, weights, 0.1)
        found.append((loss, *torch.autograd.grad(loss, (x, w))))
    assert seen == [128, 101, 128]
    for plain, filled in zip(*found, strict=True):
        close(filled, plain, 1e-12)
