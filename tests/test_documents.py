"""Documents in one sequence: their ends, the kernels that take lengths, and packed training equal to training each document alone."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl.data.batches import document_ends
from mtl.kernels import varlen
from mtl.kernels.attention import KERNELS
from mtl.kernels.masks import Documents, Mask
from tests.compare import close
from tests.ranks import Ranks
from tests.small import MESHES


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(queries: int, keys: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(1, 2, queries, heads, 8), draw(2, 2, keys, kv_heads, 8), draw(3, 2, keys, kv_heads, 8)


NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 3, 3]])
ENDS = torch.from_numpy(document_ends(NUMBERS.numpy()))


def within(start: int, stop: int) -> Tensor:
    return (ENDS - start).clamp(0, stop - start)


def test_ends_of_documents() -> None:
    assert ENDS.dtype == torch.int32
    assert ENDS.tolist() == [[3, 5, 9, 9, 9, 9, 9, 9], [1, 7, 9, 9, 9, 9, 9, 9]]
    assert document_ends(np.arange(9)[None]).tolist() == [[*range(1, 10), *[9] * 23]]
    assert document_ends(np.zeros((2, 3, 4), dtype=np.int64)).tolist() == [[[4] * 8] * 3] * 2
    assert Documents(ENDS, ENDS).pairs(9, 9).tolist() == (NUMBERS[:, :, None] == NUMBERS[:, None]).tolist()


# name: mask, queries and keys as spans of the sequence
WITHIN = {
    "whole": (Mask(), (0, 9), (0, 9)),
    "window": (Mask(window=3), (0, 9), (0, 9)),
    "not_causal": (Mask(causal=False), (0, 9), (0, 9)),
    "window_alone": (Mask(causal=False, window=2), (0, 9), (0, 9)),
    "queries_at_the_end": (Mask(offset=5), (5, 9), (0, 9)),
    "window_at_the_end": (Mask(window=4, offset=4), (5, 9), (1, 9)),
    "keys_before": (Mask(offset=4), (4, 8), (0, 4)),
    "window_before": (Mask(window=4, offset=3), (4, 6), (1, 4)),
    "narrow_window_before": (Mask(window=3, offset=2), (4, 6), (2, 4)),
}


def flash(q: Tensor, k: Tensor, v: Tensor, cuts: varlen.Cuts, scale: float, grads: tuple[Tensor, ...] = ()) -> Any:
    """FlashAttention 2's words for lengths, spelled out: windows count from the lower right corner, rows that see nothing have lse inf."""
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], float("inf")).t().contiguous().to(q.dtype)
    found = [torch.zeros_like(x) for x in (q, k, v)]
    left, right = cuts.window
    ends = [cuts.queries.tolist(), cuts.keys.tolist()]
    assert cuts.queries.dtype == cuts.keys.dtype == torch.int32
    assert ends[0][-1] == q.shape[0] and ends[1][-1] == k.shape[0] and ends[0][0] == ends[1][0] == 0
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        assert 0 <= b - a <= cuts.longest[0] and 0 <= d - c <= cuts.longest[1]
        if b > a and d > c:
            gap = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
            seen = ((left < 0) | (gap <= left)) & ((right < 0) | (-gap <= right))
            ks, vs = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = torch.einsum("qhk,thk->hqt", q[a:b], ks) * scale
            scores = scores.masked_fill(~seen, float("-inf"))
            if not grads:
                own = torch.logsumexp(scores, -1)
                out[a:b] = torch.einsum("hqt,thk->qhk", (scores - own.unsqueeze(-1)).exp().nan_to_num(0.0), vs)
                lse[:, a:b] = own.masked_fill(own == float("-inf"), float("inf"))
                continue
            grad, result, log = grads[0][a:b], grads[1][a:b], grads[2][:, a:b]
            p = (scores - log.unsqueeze(-1)).exp()
            delta = (grad * result).sum(-1).t().unsqueeze(-1)
            ds = p * (torch.einsum("qhk,thk->hqt", grad, vs) - delta) * scale
            found[0][a:b] = torch.einsum("hqt,thk->qhk", ds, ks)
            for i, x in ((1, torch.einsum("hqt,qhk->thk", ds, q[a:b])), (2, torch.einsum("hqt,qhk->thk", p, grad))):
                found[i][c:d] = x.unflatten(1, (k.shape[1], -1)).sum(2)
    return tuple(found) if grads else (out, lse)


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("impl", ["cpu", "varlen"])
def test_document_masks_as_lengths(impl: str, name: str) -> None:
    """Against the plain kernel, which draws every pair and is itself compared with torch; the lse given to backward is of more keys."""
    mask, (q_start, q_stop), (k_start, k_stop) = WITHIN[name]
    q, k, v = qkv(q_stop - q_start, k_stop - k_start, 4, 2)
    documents = Documents(within(q_start, q_stop), within(k_start, k_stop))
    want = KERNELS["plain"].forward(q, k, v, mask, documents, 0.3)
    numbers = NUMBERS[:, q_start:q_stop, None] == NUMBERS[:, None, k_start:k_stop]
    assert torch.equal(documents.pairs(q.shape[1], k.shape[1]), numbers)
    forward: Any
    backward: Any
    if impl == "cpu":
        forward, backward = KERNELS["cpu"].forward, KERNELS["cpu"].backward
    else:
        assert varlen.refuses(mask, q.shape[1], k.shape[1]) is None
        forward = partial(varlen.forward, flash)
        backward = partial(varlen.backward, lambda g, q, k, v, out, lse, cuts, scale: flash(q, k, v, cuts, scale, (g, out, lse)))
    got = forward(q, k, v, mask, documents, 0.3)
    close(got[0], want[0])
    assert torch.equal(got[1] == float("-inf"), want[1] == float("-inf"))
    close(got[1].nan_to_num(neginf=0.0), want[1].nan_to_num(neginf=0.0))
    grad, lse = draw(5, *q.shape), torch.logaddexp(want[1], draw(6, *want[1].shape))
    args = (grad, q, k, v, want[0], lse, mask, documents, 0.3)
    close(backward(*args), KERNELS["plain"].backward(*args))


def test_lengths_that_flash_attention_cannot_say() -> None:
    assert varlen.refuses(Mask(offset=2), 4, 9) is not None
    assert varlen.refuses(Mask(window=3, offset=4), 4, 4) is not None


def test_long_documents_are_cut_into_blocks_of_queries() -> None:
    q, k, v = qkv(700, 700, 2, 1)
    ends = torch.tensor([[600, 700], [10, 700]], dtype=torch.int32)
    for mask in (Mask(window=300), Mask(causal=False)):
        want = KERNELS["plain"].forward(q, k, v, mask, Documents(ends, ends), 0.3)
        close(KERNELS["cpu"].forward(q, k, v, mask, Documents(ends, ends), 0.3), want)
        args = (q, q, k, v, *want, mask, Documents(ends, ends), 0.3)
        close(KERNELS["cpu"].backward(*args), KERNELS["plain"].backward(*args))


# ---------------------------------------------------------------- packed or alone

Case = tuple[str, str, int, str, str]

DEFAULT: list[Case] = [
    ("llama", "single", 1, "none", "none"),
    ("mistral", "single", 1, "selective", "step"),
    ("gpt", "ddp", 2, "none", "none"),
    ("llama", "zero1", 2, "none", "none"),
    ("falcon", "fsdp", 2, "full", "none"),
    ("llama", "hsdp", 4, "none", "none"),
    ("gpt", "tensor", 2, "none", "none"),
    ("llama", "fsdp_tensor", 4, "none", "none"),
    ("mistral", "context", 2, "none", "none"),
    ("llama", "context", 4, "none", "none"),
    ("mistral", "ring", 4, "none", "none"),
    ("gpt", "ring", 4, "full", "none"),
    ("mistral", "ulysses", 4, "none", "none"),
    ("llama", "fsdp_context_tensor", 4, "none", "none"),
    ("mistral", "fsdp_ring_tensor", 4, "selective", "none"),
    ("falcon", "fsdp_ulysses_tensor", 4, "none", "none"),
]
ALL: list[Case] = [
    (model, table, world, remat, how)
    for model in ("llama", "llama_tied", "gpt", "falcon", "mistral")
    for table, meshes in MESHES.items()
    for world in meshes
    for remat, how in (("none", "none"), ("selective", "step" if world < 8 else "none"), ("full", "block" if world < 4 else "none"))
] + [("llama", "ring", 2, "none", "step")]


def check(ranks: Ranks, references: Path, case: Case, apart: bool = True) -> Any:
    model, table, world, remat, how = case
    path = references / f"alone-{model}.safetensors"
    if not path.exists():
        ranks.run("tests.cases.documents:alone", 1, name=model, path=str(path))
    found = ranks.run(
        "tests.cases.documents:packed", world, name=model, table=table, world=world, remat=remat, how=how, path=str(path), apart=apart
    )
    assert found["error"] < 1e-9 or not apart, found
    assert found["loss"] > 1.0 and found["tokens"] > 400, found
    return found


@pytest.mark.parametrize("case", DEFAULT, ids=lambda c: "-".join(map(str, c)))
def test_packed_equals_alone(ranks: Ranks, references: Path, case: Case) -> None:
    check(ranks, references, case)


def test_documents_that_see_each_other_are_found(ranks: Ranks, references: Path) -> None:
    assert check(ranks, references, ("llama", "ring", 2, "none", "none"), apart=False)["error"] > 1e-3


def test_light_weights_give_the_same_mean(ranks: Ranks) -> None:
    """The loss divides by the sum of the target weights, also where that is less than 1; a batch without targets has loss 0."""
    found = ranks.run("tests.cases.documents:weighed", 1, name="llama", factor=1e-4)
    assert 0 < found["tokens"] < 0.1 and abs(found["tokens"] - found["sum"]) < 1e-12, found
    assert found["error"] < 1e-9 and found["loss of nothing"] == 0.0, found


def test_every_table_is_compared() -> None:
    assert {table for _, table, *_ in DEFAULT} == set(MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda c: "-".join(map(str, c)))
def test_packed_equals_alone_in_full(ranks: Ranks, references: Path, case: Case) -> None:
    check(ranks, references, case)
