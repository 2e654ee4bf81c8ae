"""A process whose neighbour is gone ends, also where it waits in a way that notices nothing."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mtl.runtime import neighbours

ROOT = Path(__file__).parent.parent

LONELY = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from mtl.runtime import neighbours, process

def main():
    at = process.place()
    with process.process_group(at):
        if at.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that is deep in a driver
        time.sleep(600)

process.guarded(main)
"""


@pytest.mark.skipif(not Path("/proc/self/ns/pid").is_symlink(), reason="finds processes in /proc")
def test_a_neighbour_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SECONDS", 0.1)
    other = subprocess.Popen(["sleep", "600"])
    store, told, found = dist.HashStore(), threading.Event(), list[int]()
    store.set("mtl/home/1", f"{neighbours._home()} {other.pid}")
    store.set("mtl/home/2", f"elsewhere {2**22}")

    def gone(rank: int, store: Any) -> None:
        found.append(rank)
        told.set()

    neighbours.watch(store, 0, 3, gone)
    assert neighbours.alive(os.getpid()) and not told.wait(1.5)
    other.kill()
    assert told.wait(10) and found == [1]  # nobody has asked how it ended: it is still listed
    other.wait()
    assert not neighbours.alive(other.pid)


@pytest.mark.skipif(not Path("/proc/self/ns/pid").is_symlink(), reason="finds processes in /proc")
def test_a_rank_that_is_left_alone_ends_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "lonely.py").write_text(LONELY)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", str(21000 + os.getpid() % 20000)]
    begun = time.monotonic()
    run = subprocess.run([*command, str(tmp_path / "lonely.py"), str(ROOT)], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode != 0 and run.stderr.count("\nerror: process 1 of the run is gone") == 1, run.stderr
    assert time.monotonic() - begun < 60
