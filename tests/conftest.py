"""Fixtures for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
