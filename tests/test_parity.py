"""The promise: any mesh gives one device's numbers, to 1e-9 relative in float64."""

import itertools
import random
from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.small import MESHES, MODELS

Case = tuple[tuple[str, int], str, str, str, int]

PLACES = [(table, world) for table, meshes in MESHES.items() for world in meshes if table != "single"]
REMATS, HOWS, MICROS = ("none", "selective", "full"), ("step", "block", "none"), (1, 3)
FULL: list[Case] = list(itertools.product(PLACES, ("llama", "llama_tied", "gpt", "falcon"), REMATS, ("none", "step"), MICROS))
random.Random(1).shuffle(FULL)  # so that a part of it is a fair sample


def pairwise(limit_compiled: int) -> list[Case]:
    """Choose cases so that every pair of choices of two factors occurs; compiled ones on at most ``limit_compiled`` ranks.

    A table meets one of the two ways to compile, models, remats and micro-batches both (slow tests have the rest). Of those that bring as
    many new pairs, the quickest: not compiled, then by blocks, on few ranks.
    """
    factors = (PLACES, list(MODELS), REMATS, HOWS, MICROS)
    everything = [c for c in itertools.product(*factors) if c[3] == "none" or c[0][1] <= limit_compiled]
    rng = random.Random(0)

    def pairs(case: Case) -> set[object]:
        # a place counts as its table and its world, so that every table meets every model
        parts = [("table", case[0][0]), ("world", case[0][1]), *enumerate(case[1:])]
        found: set[object] = set(itertools.combinations(parts, 2))
        table, how = parts[0], parts[4]
        return found - {(table, how)} | {(table, case[3] == "none")}

    missing = set().union(*(pairs(c) for c in everything))
    chosen: list[Case] = []
    while missing:
        best = max(rng.sample(everything, min(300, len(everything))), key=lambda c: (len(pairs(c) & missing), HOWS.index(c[3]), -c[0][1]))
        if pairs(best) & missing:
            chosen.append(best)
            missing -= pairs(best)
    return chosen


def covering() -> list[Case]:
    """Meet every table on two and on four ranks, eager, with everything else in turn: models, remats, micro-batches (on two ranks)."""
    tables, models = [table for table in MESHES if table != "single"], list(MODELS)
    turns = [(i, i + i // 6 + k, k, (table, world)) for i, table in enumerate(tables) for k, world in enumerate((2, 4))]
    return [(place, models[(i + 3 * k) % 6], REMATS[turn % 3], "none", MICROS[turn % 2 * (1 - k)]) for i, turn, k, place in turns]


def check(ranks: Ranks, references: Path, case: Case) -> None:
    """Compare one case with one device."""
    (table, world), model, remat, how, micros = case
    path = references / f"{model}-{micros}.safetensors"
    if not path.exists():
        ranks.run("tests.cases.train:reference", 1, model=model, micros=micros, path=str(path))
    found = ranks.run(
        "tests.cases.train:parity", world, table=table, world=world, model=model, remat=remat, how=how, micros=micros, path=str(path)
    )  # fmt: skip
    assert found["error"] < 1e-9, found
    assert found["moved"] > 1e-3, "the reference's loss hardly moved: the comparison proves nothing"


def name(case: Case) -> str:
    """Name a case in the test report."""
    return "-".join(str(part) for part in (*case[0], *case[1:]))


MANY: list[Case] = [
    (("hsdp", 8), "gpt", "full", "none", 1),
    (("fsdp_context_tensor", 8), "falcon", "none", "none", 1),
]
COMPILED: list[Case] = [
    (("zero1", 2), "falcon", "selective", "block", 1),
    (("context", 2), "alibi", "none", "block", 1),
    (("ddp", 2), "mistral", "selective", "step", 1),
    (("ulysses", 2), "llama", "dense", "step", 1),
    (("fsdp", 2), "llama_tied", "full", "step+engine", 3),
    (("tensor", 2), "gpt", "gather", "step+pieces", 1),
    (("tensor", 2), "llama_tied", "full", "block+pieces", 1),
]
"""Every model in one of the two ways, and every way to move data. Tracing for four ranks takes up to half a minute."""
LONGER: list[Case] = [
    (("ring", 2), "mistral", "selective", "step", 1),
    (("ulysses", 2), "llama", "dense", "step", 3),
    (("ddp", 2), "gpt", "none", "block", 1),
    (("hsdp", 2), "llama_tied", "none", "block", 3),
    (("fsdp_tensor", 4), "llama", "gather", "block", 1),
    (("fsdp_ring_tensor", 8), "llama_tied", "selective", "none", 1),
    (("tensor", 2), "llama_tied", "gather", "none+pieces", 3),
    (("tensor", 4), "falcon", "full", "none+pieces", 1),
    (("fsdp_tensor", 4), "gpt", "none", "none+pieces", 1),
    (("fsdp_context_tensor", 4), "llama", "none", "none+pieces", 1),
    (("fsdp", 2), "llama", "dense", "step", 1),
    (("ring", 4), "llama_tied", "dense", "none", 3),
    (("tensor", 8), "mistral", "selective", "none+pieces", 1),
    (("fsdp_tensor", 8), "alibi", "gather", "none+pieces", 1),
    (("fsdp_context_tensor", 8), "falcon", "mlp", "none+pieces", 1),
    (("hsdp", 4), "gpt", "selective", "step+engine", 1),
    (("tensor", 2), "gpt", "gather", "block", 1),
    (("fsdp_context_tensor", 4), "falcon", "full", "block", 1),
    (("tensor", 2), "llama", "none", "step+pieces", 1),
    (("fsdp", 4), "llama", "none", "step+engine", 1),
    (("fsdp_tensor", 4), "llama_tied", "full", "step+engine", 3),
    (("fsdp_tensor", 4), "llama", "gather", "step", 1),
    (("hsdp", 4), "gpt", "selective", "step", 3),
    (("fsdp_ulysses_tensor", 4), "llama", "mlp:2", "block", 1),
    (("fsdp", 2), "mistral", "mlp", "step+engine", 3),
    (("fsdp_ring_tensor", 4), "gpt", "dense", "block", 1),
    *((place, "llama_tied", "full", "block", 1) for place in PLACES if place[1] == 2),
]
IN_PIECES: list[Case] = [
    (("tensor", 4), "llama", "none", "none+pieces", 1),  # two kv heads over four devices
    (("tensor", 2), "mistral", "selective", "none+pieces", 1),
    (("fsdp_tensor", 4), "alibi", "gather", "none+pieces", 1),
    (("fsdp_ring_tensor", 4), "llama", "full", "none+pieces", 1),
    (("fsdp_context_tensor", 4), "falcon", "mlp", "none+pieces", 1),
    (("fsdp_ulysses_tensor", 4), "alibi", "dense", "none+pieces", 1),
    (("ring", 4), "llama_tied", "dense", "none", 1),
    (("fsdp_ulysses_tensor", 4), "gpt", "selective", "none+pieces", 1),
]


@pytest.mark.parametrize("case", covering() + MANY + COMPILED + IN_PIECES, ids=name)
def test_mesh_equals_one_device(ranks: Ranks, references: Path, case: Case) -> None:
    check(ranks, references, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", pairwise(limit_compiled=2), ids=name)
def test_every_pair_of_choices(ranks: Ranks, references: Path, case: Case) -> None:
    check(ranks, references, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*LONGER, *FULL], ids=name)
def test_full_product(ranks: Ranks, references: Path, case: Case) -> None:
    check(ranks, references, case)


def test_accumulation_does_not_change_the_numbers(ranks: Ranks, references: Path) -> None:
    """One micro-batch or three: the mean is over all target tokens of the global batch."""
    path = references / "llama-1.safetensors"
    if not path.exists():
        ranks.run("tests.cases.train:reference", 1, model="llama", micros=1, path=str(path))
    found = ranks.run(
        "tests.cases.train:parity", 2, table="fsdp", world=2, model="llama", remat="none", how="none", micros=3, path=str(path)
    )
    assert found["error"] < 1e-9, found
