"""Fixtures for all tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import sharding_rules
from mtl.runtime.process import Place, process_group
from mtl.sharding.mesh import MeshShape, make_mesh
from mtl.sharding.parallel import Parallel
from tests.ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Eight gloo ranks, kept for the session."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one-device results are kept while the session lasts."""
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def one() -> Iterator[Callable[..., Parallel]]:
    """Make a Parallel of this process alone: ``one(vocab=11)`` says the sizes of the logical axes."""
    with process_group(Place(0, 1, 0, torch.device("cpu"))):
        mesh = make_mesh(MeshShape(), "cpu")
        yield lambda **sizes: Parallel(mesh, sharding_rules.load("single"), sizes, torch.float64)
