"""The other processes of a run on this host: where one is gone, none that waits for it on a GPU waits for ever.

Over gloo a process that dies closes its connections, and the others notice. A GPU that waits for another's message notices nothing.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 8.0
"""A process that outlives another for this long was left alone by it: those that end as they should end together."""


def watch(store: Any, rank: int, world: int, gone: Callable[[int, Any], None]) -> threading.Event:
    """Call ``gone(rank, store)``, from a thread, if another process of this host is gone and this one is still here.

    The ``store`` must be a connection of the thread's own. Setting the event that is given ends the watch.
    """
    over, here = threading.Event(), _home()
    store.set(f"mtl/home/{rank}", f"{here} {os.getpid()}")
    homes = [text.decode().rpartition(" ") for text in store.multi_get([f"mtl/home/{i}" for i in range(world)])]
    others = {i: int(pid) for i, (home, _, pid) in enumerate(homes) if here and home == here and i != rank}
    if others:
        threading.Thread(target=_look, args=(others, lambda lost: gone(lost, store), over), name="neighbours", daemon=True).start()
    return over


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and whose parent has not noticed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _look(others: Mapping[int, int], gone: Callable[[int], None], over: threading.Event) -> None:
    while not over.wait(1.0):
        lost: Sequence[int] = [rank for rank, pid in others.items() if not alive(pid)]
        if lost:
            time.sleep(SECONDS)
            if not over.is_set():
                gone(lost[0])
            return


def _home() -> str:
    """Name what process numbers here belong to: a start of a machine and a namespace of its processes; empty where that is unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
