"""Generation: the cache gives the full forward's logits on every table; any mesh writes the same text; sampling draws what it should."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mtl import tree
from mtl.errors import UserError
from mtl.generate.decode import generate
from mtl.generate.sampling import PIECE, Sampling, allowed, best, choose
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.sharding.parallel import Parallel
from tests.ranks import Ranks
from tests.small import MESHES, MODELS

PLACES = [(table, world) for table, meshes in MESHES.items() for world in meshes]
ALL = [(*place, model) for place in PLACES for model in MODELS]
NAMES = list(MODELS)
SOME = [(table, max(w for w in meshes if w <= 4), NAMES[i % len(NAMES)]) for i, (table, meshes) in enumerate(MESHES.items())]
SOME += [("tensor", 4, "llama"), ("ring", 4, "gpt")]  # kv heads fewer than the tensor axis, first


def cached(ranks: Ranks, references: Path, table: str, world: int, model: str, compiled: bool = False) -> None:
    """Compare decoding with the full forward."""
    path = references / f"generate-{model}.safetensors"
    if not path.exists():
        ranks.run("tests.cases.generate:reference", 1, model=model, path=str(path))
    found = ranks.run("tests.cases.generate:cached", world, table=table, world=world, model=model, path=str(path), compiled=compiled)
    assert found["error"] < 1e-9, found
    assert found["held"] == found["said"]
    shape = MESHES[table][world]
    if shape.context > 1 or shape.fsdp > 1 or shape.replica > 1:
        assert found["held"] < found["whole"], "the cache is split over the mesh"


@pytest.mark.parametrize("case", SOME, ids=lambda c: "-".join(map(str, c)))
def test_decode_equals_full_forward(ranks: Ranks, references: Path, case: tuple[str, int, str]) -> None:
    cached(ranks, references, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda c: "-".join(map(str, c)))
def test_decode_equals_full_forward_everywhere(ranks: Ranks, references: Path, case: tuple[str, int, str]) -> None:
    cached(ranks, references, *case)


@pytest.mark.parametrize("case", [("single", 1, "mistral"), ("fsdp_tensor", 2, "llama")], ids=lambda c: "-".join(map(str, c)))
def test_compiled_decode_equals_full_forward(ranks: Ranks, references: Path, case: tuple[str, int, str]) -> None:
    cached(ranks, references, *case, compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "gpt", "mistral"])
def test_inductor_writes_the_same_text(ranks: Ranks, model: str) -> None:
    want = ranks.run("tests.cases.generate:continued", 1, table="single", world=1, model=model)
    for table, world, backend in (("single", 1, "inductor"), ("fsdp_tensor", 2, "aot_eager")):
        found = ranks.run("tests.cases.generate:continued", world, table=table, world=world, model=model, backend=backend)
        assert found == want, table


@pytest.mark.parametrize("model", ["mistral", pytest.param("llama", marks=pytest.mark.slow)])
def test_every_mesh_writes_the_same_text(ranks: Ranks, model: str) -> None:
    want = ranks.run("tests.cases.generate:continued", 1, table="single", world=1, model=model)
    assert len({str(v) for v in want.values()}) == 3, "greedy, sampled and filtered texts differ"
    for table, world in (("fsdp_tensor", 4), ("fsdp_context_tensor", 4), ("ddp", 2)):
        assert ranks.run("tests.cases.generate:continued", world, table=table, world=world, model=model) == want, table


@pytest.fixture(scope="module")
def small(one: Callable[..., Parallel]) -> Callable[..., list[list[int | None]]]:
    """Continue prompts with a small model on one device."""
    config, par = MODELS["llama"], one()
    params = tree.map(lambda p: p * 8, init(decoder.specs(config), par.rules, par.mesh, 0, torch.float32))

    def run(prompts: list[list[int]], count: int, how: Sampling | None = None, ends: tuple[int, ...] = ()) -> list[list[int | None]]:
        return list(generate(decoder, config, par.mesh, par.rules, PRECISIONS["fp32"], params, prompts, count, how, ends))

    return run


def test_a_prompt_is_continued_the_same_alone_and_beside_others(small: Callable[..., list[list[int | None]]]) -> None:
    prompts = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    together = small(prompts, 10)
    for i, prompt in enumerate(prompts):
        assert [t[0] for t in small([prompt], 10)] == [t[i] for t in together]


def test_exactly_as_many_tokens_as_asked_for(small: Callable[..., list[list[int | None]]]) -> None:
    for count in (0, 1, 2, 7):
        assert len(small([[1, 2]], count)) == count


def test_a_row_ends_with_its_end_token(small: Callable[..., list[list[int | None]]]) -> None:
    free = small([[1, 2], [3, 4, 5]], 12)
    end = free[4][0]
    assert end is not None
    ended = small([[1, 2], [3, 4, 5]], 12, None, (end,))
    first = [t[0] for t in free].index(end)
    assert [t[0] for t in ended[: first + 1]] == [t[0] for t in free[: first + 1]], "the end token itself is given"
    assert all(t[0] is None for t in ended[first + 1 :])
    alone = small([[1, 2]], 12, None, (end,))
    assert len(alone) == first + 1, "with every row over, nothing more is computed"


def test_gradients_stay_on_around_a_generator(small: Callable[..., list[list[int | None]]], one: Callable[..., Parallel]) -> None:
    config, par = MODELS["llama"], one()
    params = init(decoder.specs(config), par.rules, par.mesh, 0, torch.float32)
    for _ in generate(decoder, config, par.mesh, par.rules, PRECISIONS["fp32"], params, [[1]], 2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompts", "count", "says"),
    [([[]], 3, "prompt 0 has no tokens"), ([[1], [250]], 3, "vocabulary has 250"), ([[1]], -1, "max-tokens is -1"), ([], 3, "no prompt")],
)
def test_what_cannot_be_continued_is_refused(
    small: Callable[..., list[list[int | None]]], prompts: list[list[int]], count: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        small(prompts, count)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_it_would_launch(ranks: Ranks) -> None:
    found = [ranks.run("tests.cases.generate:on_gpu", 1, backend=backend) for backend in (None, "inductor")]
    assert found[0] == found[1] and len(found[0]["greedy"]) == 40


def test_learned_positions_run_out(one: Callable[..., Parallel]) -> None:
    par, config = one(), MODELS["gpt"]
    params = init(decoder.specs(config), par.rules, par.mesh, 0, torch.float32)
    args = (decoder, config, par.mesh, par.rules, PRECISIONS["fp32"], params)
    assert len(list(generate(*args, [[1] * 30, [2]], 10))) == 10
    with pytest.raises(UserError, match=r"learned 40 positions\. Ask for at most 10 tokens"):
        list(generate(*args, [[1] * 30, [2]], 11))


@pytest.mark.parametrize(
    ("setting", "says"),
    [({"temperature": -1.0}, "temperature is -1"), ({"temperature": float("nan")}, "temperature is nan"), ({"top_k": -1}, "top-k is -1"),
     ({"top_p": 0.0}, "top-p is 0"), ({"top_p": 1.5}, "top-p is 1.5")],
)  # fmt: skip
def test_bad_sampling_is_refused(setting: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Sampling(**setting)  # type: ignore[arg-type]


def test_filters_keep_the_best() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2]]).log()

    def kept(how: Sampling) -> list[list[int]]:
        return [row.isfinite().nonzero().flatten().tolist() for row in allowed(logits, how)]

    assert kept(Sampling(1.0, top_k=2)) == [[2, 3], [0, 2]]
    assert kept(Sampling(1.0, top_p=0.39)) == [[3], [0]]
    assert kept(Sampling(1.0, top_p=0.41)) == [[2, 3], [0, 2]]
    assert kept(Sampling(1.0, top_p=0.69)) == [[2, 3], [0, 2]]
    assert kept(Sampling(1.0, top_p=0.71)) == [[1, 2, 3], [0, 2, 3]]
    assert kept(Sampling(1.0, top_k=1, top_p=0.99)) == [[3], [0]]
    assert kept(Sampling(1.0, top_k=9)) == [[0, 1, 2, 3]] * 2


def test_draws_follow_the_softmax() -> None:
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = torch.arange(20000)
    tokens = choose((odds.log() * 2).expand(20000, 4), Sampling(2.0, seed=4), rows, torch.tensor(3))
    found = Counter(tokens.tolist())
    for token, p in enumerate(odds.tolist()):
        assert abs(found[token] / 20000 - p) < 4 * (p * (1 - p) / 20000) ** 0.5
    assert not torch.equal(tokens, choose(odds.log().expand(20000, 4), Sampling(1.0, seed=5), rows, torch.tensor(3)))
    assert not torch.equal(tokens, choose(odds.log().expand(20000, 4), Sampling(1.0, seed=4), rows, torch.tensor(4)))


@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, 3 * PIECE, 5 * PIECE + 17])
def test_the_best_is_the_first_of_the_largest(size: int) -> None:
    for coarse in (1.0, 20.0):  # few values: many are equal
        logits = (torch.randn(50, size) * coarse).round()
        logits[:, ::7] = -torch.inf
        assert torch.equal(best(logits), logits.argmax(-1))
    assert best(torch.full((2, size), -torch.inf)).tolist() == [0, 0]
