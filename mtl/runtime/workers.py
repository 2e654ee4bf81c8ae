"""Worker processes: results in the order of the work, a bounded amount of work under way, no process left behind."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from mtl.errors import UserError

Work = TypeVar("Work")
Result = TypeVar("Result")

_task: Any = None


def cores(share: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Count the cores this process may use: those it is bound to, and no more than its container's share of their time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, share.read_text().split())
    except (OSError, ValueError):  # no such file, or "max": all
        return bound
    return max(1, min(bound, quota // max(1, period)))


def one_thread_a_process() -> None:
    """Keep tokenizer libraries from starting threads of their own: processes are what is counted."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def ordered_map(task: Callable[[Work], Result], work: Iterable[Work], workers: int) -> Iterator[tuple[Work, Result]]:
    """Give (work, result) in order. With one worker the task runs here; else in forked processes, which share what the task holds."""
    if workers == 1:
        for item in work:
            yield item, task(item)
        return
    context = multiprocessing.get_context("fork")
    under_way: deque[tuple[Work, Future[Result]]] = deque()
    pool = ProcessPoolExecutor(workers, context, _start, (task, os.getpid()))
    try:
        for item in work:
            under_way.append((item, pool.submit(_run, item)))
            if len(under_way) > 2 * workers:
                first, result = under_way.popleft()
                yield first, result.result()
        while under_way:
            first, result = under_way.popleft()
            yield first, result.result()
    except BrokenProcessPool:
        raise UserError(f"a worker process was killed, perhaps for want of memory: use fewer --workers than {workers}.") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(task: Any, parent: int) -> None:
    global _task  # noqa: PLW0603 - a worker process does one task all its life
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(item: Any) -> Any:
    return _task(item)
