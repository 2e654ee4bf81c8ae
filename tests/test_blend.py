"""Blends: within one sample of the weights at every prefix, every slot the same however it is reached."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.data import blend as module
from mtl.data.blend import Blend
from mtl.errors import UserError

WEIGHTS = st.lists(st.fractions(Fraction(1, 200), 20, max_denominator=1000), min_size=1, max_size=9)


def within_one(blend: Blend, count: int) -> None:
    """Walk a prefix and hold the bound exactly, in whole numbers."""
    taken = [0] * len(blend.weights)
    for n in range(count):
        k, number = blend(n)
        assert number == taken[k], "a corpus's samples come in turn, none left out"
        taken[k] += 1
        for have, weight in zip(taken, blend.weights, strict=True):
            assert abs(have * blend.total - weight * (n + 1)) < blend.total


@settings(deadline=None, max_examples=60)
@given(WEIGHTS)
def test_every_prefix_is_within_one_sample_of_the_weights(weights: list[Fraction]) -> None:
    within_one(Blend(weights), 1500)


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.integers(1, 300), st.data())
def test_a_slot_is_the_same_however_it_is_reached(weights: list[Fraction], block: int, data: st.DataObject) -> None:
    """Small blocks make the jump into the middle happen often: it must agree with the walk from 0."""
    walk = Blend(weights)
    want = [walk(n) for n in range(1200)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        for n in data.draw(st.lists(st.integers(0, 1199), min_size=1, max_size=12)):
            assert Blend(weights)(n) == want[n]


def test_many_corpora_far_into_a_run() -> None:
    weights = [Fraction(f"0.{i * 7919 % 10007:05}{i}") for i in range(1, 60)]
    blend = Blend(weights)
    for start in (10**9, 10**12 + 12345):
        for n in range(start, start + 5000, 41):
            k, number = blend(n)
            assert abs((number + 1) * blend.total - blend.weights[k] * (n + 1)) < blend.total
    assert Blend(weights)(10**12 + 99) == blend(10**12 + 99)


def test_weights_are_exact_and_zero_gives_nothing() -> None:
    assert Blend([Fraction("0.3"), Fraction("0.7")]).weights == (3, 7)
    assert {Blend([0, 2, 3])(n)[0] for n in range(100)} == {1, 2}
    assert [Blend([1])(n) for n in range(3)] == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1]])
def test_weights_that_make_no_blend(weights: list[int]) -> None:
    with pytest.raises(UserError, match="none may be negative, and one at least must be above 0"):
        Blend(weights)


def test_a_weight_too_small() -> None:
    with pytest.raises(UserError, match="the smallest is under one sample in 1,000,000"):
        Blend([Fraction("1e-7"), 1])
    Blend([Fraction("1e-5"), 1])
