"""One token's attention to the cache: the kernel against separate operations, inside compiled decoding and alone on a GPU."""

from collections.abc import Callable

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor

from mtl import tree
from mtl.generate.decode import generate
from mtl.generate.weights import lay_side_by_side
from mtl.kernels import cached
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.sharding.parallel import Parallel
from tests.small import MODELS

SHAPES = [(1, 200, 2, 4, 32, None, 150), (3, 130, 1, 3, 24, 20, 129), (2, 500, 2, 2, 16, 37, -1), (32, 700, 8, 4, 128, None, 640)]
"""Rows, slots, key heads, queries a key head, their size, window, slot."""


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_decoding_with_the_one_operation_writes_the_same_text(
    one: Callable[..., Parallel], monkeypatch: pytest.MonkeyPatch, model: str, backend: str | None
) -> None:
    config, par = MODELS[model], one()
    params = tree.map(lambda p: p * 8, init(decoder.specs(config), par.rules, par.mesh, 0, torch.float32))
    lay_side_by_side(decoder, config, par.mesh, par.rules, params)

    def run() -> list[list[int | None]]:
        rows = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
        return list(generate(decoder, config, par.mesh, par.rules, PRECISIONS["fp32"], params, rows, 12, backend=backend))

    calls: list[tuple[int, ...]] = []
    with inductor_config.patch(force_disable_caches=True):  # they cannot know of what is patched here
        want = run()
        monkeypatch.setattr(cached, "refuses", lambda q, keys: calls.append(tuple(q.shape)))
        assert run() == want
    assert calls, "the operation was used"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turn", [None, False, True], ids=["as it is", "half", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_what_it_means(shape: tuple[int, ...], turn: bool | None, dtype: torch.dtype) -> None:
    rows, slots, heads, group, size, window, slot = shape
    torch.manual_seed(0)

    def random(*of: int) -> Tensor:
        return torch.randn(of, device="cuda").to(dtype)

    q, k, v = random(rows, 1, (group + 2) * heads, size).split([group * heads, heads, heads], 2)
    cache = random(rows, slots, heads, size), random(rows, slots, heads, size)
    count = max(slot, 60)
    places = torch.arange(slots, device="cuda").repeat(rows, 1)
    places[:, count - 30 : count] += torch.arange(rows, device="cuda").unsqueeze(1) % 2 << 62
    places[:, count + 1 :] = 1 << 62
    positions = torch.full((rows, 1), count, device="cuda")
    turns = torch.zeros(rows * heads, dtype=torch.int32, device="cuda")
    angles = (None, None) if turn is None else (torch.randn(rows, 1, size // 2, device="cuda") for _ in range(2))
    rest = torch.tensor([slot], device="cuda"), places, positions, turns, *angles, bool(turn), window, size**-0.5
    copies = [x.clone() for x in cache]
    want = cached.plain(q, k, v, *copies, *rest)
    for _ in range(3):
        got = cached.launch(q, k, v, *cache, *rest)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for a, b in zip((*cache, got), (*copies, want), strict=True):
        assert (a.float() - b.float()).abs().max() <= bound * b.float().abs().max().clamp(min=1)
