"""Fixtures for all tests. torch is imported where it is used: the process that hands out tests to the others never needs it."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.forks import Forks
from tests.ranks import Ranks

if TYPE_CHECKING:
    from mtl.sharding.parallel import Parallel

WORKERS = 4
"""At most so many share the tests: each has a pool of ranks of its own, and takes up to 2 GiB."""

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TENSORIFY_PYTHON_SCALARS", "0")
"""This pass of torch's has all traced a second time where an argument is a float64 number on the CPU, as the loss scale in float64 is."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One a core for folders; none, and so no start of workers, for files and tests that are named, for ``-k`` and for ``-s``."""
    few = any(not Path(arg).is_dir() for arg in config.args) or config.option.keyword or config.option.capture == "no"
    cores = min(len(os.sched_getaffinity(0)), WORKERS)
    return 0 if few or cores == 1 else cores


def pytest_collection_finish() -> None:
    """Keep what the imports made out of garbage collections, which would look through all of it for every test that asks for one."""
    gc.freeze()


@pytest.fixture(params=["plain", "squeezed", "rows"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Save as where the processor sets the pace, as where a disk does, and as in memory, whatever this machine is."""
    from mtl.checkpoint import arrays, files

    monkeypatch.setattr(files, "MEMORY", (files._file_system(tmp_path),) if request.param == "rows" else ())
    monkeypatch.setattr(arrays, "SQUEEZE_CORES", 0 if request.param == "squeezed" else 1 << 20)
    return request.param


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Eight gloo ranks, kept for the session."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs of pretrain.py and finetune.py without the slow start, kept for the session."""
    pool = Forks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one-device results are kept while the session lasts."""
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def one() -> Iterator[Callable[..., "Parallel"]]:
    """Make a Parallel of this process alone: ``one(vocab=11)`` says the sizes of the logical axes."""
    import torch

    import sharding_rules
    from mtl.runtime.process import Place, process_group
    from mtl.sharding.mesh import MeshShape, make_mesh
    from mtl.sharding.parallel import Parallel

    with process_group(Place(0, 1, 0, torch.device("cpu"))):
        mesh = make_mesh(MeshShape(), "cpu")
        yield lambda **sizes: Parallel(mesh, sharding_rules.load("single"), sizes, torch.float64)
