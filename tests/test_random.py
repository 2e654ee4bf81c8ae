"""Random numbers from counters: their distribution, their independence, and that a part's numbers are the whole's."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtl import params, random
from mtl.params import ParamSpec, init_box
from mtl.runtime.compile import compiled
from tests.compare import same

COUNT = 1 << 18
CPU = torch.device("cpu")


def correlation(a: Tensor, b: Tensor) -> float:
    """Give the correlation in standard deviations of what independent numbers have."""
    a, b = (x.flatten() - x.mean() for x in (a, b))
    return ((a * b).mean() / (a.std() * b.std())).item() * a.numel() ** 0.5


def test_every_bit_is_a_fair_coin() -> None:
    bits = random.bits(random.key("coin"), torch.arange(COUNT))
    ones = torch.stack([((bits >> n) & 1).double() for n in range(64)])
    assert ((ones.mean(1) - 0.5).abs() < 5 * 0.5 * COUNT**-0.5).all()
    assert ((ones @ ones.t() / COUNT - 0.25).fill_diagonal_(0.0).abs() < 6 * 0.433 * COUNT**-0.5).all(), "bits do not know each other"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform(dtype: torch.dtype) -> None:
    for key in (0, 1, -1, random.key("some", 3)):
        u = random.uniform(key, torch.arange(COUNT), dtype)
        assert u.dtype == dtype
        u = u.double()
        assert abs(u.mean() - 0.5) < 5 * (COUNT * 12) ** -0.5
        assert abs(u.var() - 1 / 12) < 5 * (COUNT * 180) ** -0.5
        cells = torch.histc(u, 64, 0.0, 1.0)
        chi_square = ((cells - COUNT / 64) ** 2 / (COUNT / 64)).sum()
        assert abs(chi_square - 63) < 5 * (2 * 63) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_never_0_or_1(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    for extreme in (0, -1):
        monkeypatch.setattr(random, "bits", lambda key, index, extreme=extreme: torch.full_like(index, extreme))
        u = random.uniform(0, torch.arange(1), dtype)
        assert 0.0 < u.item() < 1.0
        assert random.normal(0, torch.arange(1)).isfinite().all()
        assert abs(u.item() - (extreme == -1)) < 1e-6, "and the ends are reached"


def test_normal() -> None:
    x = random.normal(random.key("normal"), torch.arange(COUNT))
    assert x.dtype == torch.float64
    for power, (mean, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), 1):
        assert abs((x**power).mean() - mean) < 5 * (variance / COUNT) ** 0.5
    for edge, share in ((-2.0, 0.0227501), (-1.0, 0.1586553), (1.5, 0.9331928)):
        assert abs((x < edge).double().mean() - share) < 5 * (share * (1 - share) / COUNT) ** 0.5


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
def test_neighbours_and_keys_are_independent(draw: Any) -> None:
    index, key = torch.arange(COUNT), random.key("independent")
    x = draw(key, index)
    for lag in (1, 2, 3, 64, 1000, 4096):
        assert abs(correlation(x[lag:], x[:-lag])) < 5, lag
    for other in (key + 1, key - 1, key ^ (1 << 40), -key, random.key("independent", 0)):
        y = draw(other, index)
        assert abs(correlation(x, y)) < 5
        assert abs(correlation(x[1:], y[:-1])) < 5 and abs(correlation(x[:-1], y[1:])) < 5
    keys = torch.arange(COUNT)  # the other way: one index, many keys
    along = draw(keys, torch.tensor(7))
    assert abs(correlation(along[1:], along[:-1])) < 5
    assert abs(along.mean() - x.mean()) < 5 * (2 / COUNT) ** 0.5


def test_a_number_depends_on_key_and_index_alone() -> None:
    key = random.key(4)
    whole = random.normal(key, torch.arange(1000))
    assert same(random.normal(key, torch.arange(300, 400).reshape(10, 10)), whole[300:400].reshape(10, 10))
    assert same(random.normal(torch.tensor(key), torch.arange(1000)), whole)
    assert random.normal(key, torch.tensor([17])).item() == whole[17].item()
    assert len(set(random.bits(key, torch.arange(COUNT)).tolist())) == COUNT, "a permutation of the counters"


def test_keys_know_types_order_and_borders() -> None:
    parts = [(1,), ("1",), (1, 2), (12,), ("1", 2), ("a", "b"), ("ab",), ("b", "a"), ("a", ""), ("",), (), (-1,), (0,), ("a",), (1 << 70,)]
    keys = [random.key(*p) for p in parts]
    assert len(set(keys)) == len(parts)
    assert all(-(1 << 63) <= k < 1 << 63 for k in keys)
    assert any(k < 0 for k in keys) and any(k > 0 for k in keys)
    assert random.key("a", 1) == random.key("a", 1)
    assert random.key(7, "layers.query.weight") == -5928422485813477641, "another value would change the weights every run starts from"


def splitmix(x: int) -> int:
    """The finaliser of Steele, Lea and Flood, on Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_bits_are_two_rounds_of_splitmix() -> None:
    for key in (0, -1, 3, random.key("a"), random.key("b", 1), -(1 << 63)):
        index = [0, 1, 2, 10**12, (1 << 62) + 5]
        want = [splitmix(splitmix((i * 0x9E3779B97F4A7C15 + key) % 2**64) ^ (key % 2**64)) for i in index]
        assert [x % 2**64 for x in random.bits(key, torch.tensor(index)).tolist()] == want


# ---------------------------------------------------------------- parts of arrays


@st.composite
def boxes(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Draw (whole shape, offset, shape of a box inside), empty ones too."""
    whole = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    start = tuple(draw(st.integers(0, size)) for size in whole)
    return whole, start, tuple(draw(st.integers(0, size - s)) for size, s in zip(whole, start, strict=True))


def cut(x: Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return x[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]


@settings(deadline=None)
@given(boxes())
def test_global_index_is_a_slice_of_the_whole_count(box: Any) -> None:
    whole, start, shape = box
    count = torch.arange(torch.Size(whole).numel()).reshape(whole)
    assert torch.equal(random.global_index(shape, start, whole, CPU), cut(count, start, shape))


@settings(deadline=None)
@given(boxes(), st.integers(-(1 << 63), (1 << 63) - 1), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(1, 50))
def test_a_parameters_part_is_a_slice_of_the_whole(box: Any, key: int, dtype: torch.dtype, chunk: int) -> None:
    shape, start, part = box
    spec = ParamSpec(shape, "LDHK"[: len(shape)], std=0.5)
    whole = init_box(spec, key, (0,) * len(shape), shape, dtype, CPU)
    index = torch.arange(whole.numel()).reshape(shape)
    assert torch.equal(whole, (random.normal(key, index) * 0.5).to(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(params, "_CHUNK", chunk)
        assert torch.equal(init_box(spec, key, start, part, dtype, CPU), cut(whole, start, part))


@pytest.mark.parametrize("chunk", [1, 7, 24, 100, 1 << 22])
def test_init_draws_at_most_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    spec = ParamSpec((5, 4, 6), "LDF", std=1.0)
    want = init_box(spec, 3, (0, 0, 0), spec.shape, torch.float64, CPU)
    sizes: list[int] = []
    normal = random.normal
    monkeypatch.setattr(params, "_CHUNK", chunk)
    monkeypatch.setattr(random, "normal", lambda key, index: (sizes.append(index.numel()), normal(key, index))[1])
    assert same(init_box(spec, 3, (0, 0, 0), spec.shape, torch.float64, CPU), want)
    assert sum(sizes) == 120 and max(sizes) <= chunk


def test_constants_and_other_keys() -> None:
    assert torch.equal(init_box(ParamSpec((3,), "W", fill=2.5), 1, (1,), (2,), torch.float64, CPU), torch.full((2,), 2.5).double())
    spec = ParamSpec((64,), "W", std=1.0)
    a, b = (init_box(spec, random.key(0, name), (0,), (64,), torch.float64, CPU) for name in ("a", "b"))
    assert (a != b).all()


# ---------------------------------------------------------------- permutations


@settings(deadline=None)
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(1, 600))
def test_permute_is_a_permutation(key: int, size: int) -> None:
    assert sorted(random.permute(key, i, size) for i in range(size)) == list(range(size))


def test_permutations_differ_and_have_no_order() -> None:
    size = 1000
    orders = torch.tensor([[random.permute(random.key("order", k), i, size) for i in range(size)] for k in range(8)]).double()
    places = torch.arange(size).double()
    for i, order in enumerate(orders):
        assert abs(correlation(order, places)) < 5
        assert abs(correlation(order[1:], order[:-1])) < 5
        assert (order == places).sum() < 10
        assert all(abs(correlation(order, other)) < 5 for other in orders[:i])


def test_compiled_bits_are_the_same() -> None:
    """Counters made inside the graph: inductor's code for the CPU once multiplied them in 32 bits, and wrote past its array."""
    key = random.bits(7, torch.arange(3)).unsqueeze(-1)

    def draw(key: torch.Tensor) -> torch.Tensor:
        return random.uniform(key, torch.arange(5, 255))

    assert torch.equal(compiled(draw)(key), draw(key))
