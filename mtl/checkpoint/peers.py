"""Agreement between processes through the store they met at: no collective, so a background thread may use it beside training."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from mtl.errors import UserError

T = TypeVar("T")
WAIT_SECONDS = 1800.0


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read: the message names the file and what to do."""


class Damaged(CheckpointError):
    """A checkpoint whose files are not what was written: another one may be good."""


@dataclass(frozen=True)
class Peers:
    """One process among those that save or restore together."""

    rank: int = 0
    world: int = 1
    store: Any = None
    timeout: float = WAIT_SECONDS

    def agree(self, purpose: str, error: str | None, value: Any = None, damaged: bool = False) -> list[Any]:
        """Wait for every process, raise everywhere if one of them reports an error, and give the values of all.

        Every process must call with the same purposes in the same order. Values are JSON.
        """
        if self.world == 1 or self.store is None:
            if error is not None:
                raise (Damaged if damaged else CheckpointError)(error)
            return [value]
        name = f"mtl/{purpose}/{self.store.add(f'mtl/{purpose}/{self.rank}/calls', 1)}"
        self.store.set(f"{name}/{self.rank}", json.dumps([error, value, damaged]))
        if self.rank == 0:
            answers = [self._take(f"{name}/{i}", purpose, f"process {i}") for i in range(self.world)]
            self.store.set(f"{name}/all", json.dumps(answers))
        else:
            answers = self._take(f"{name}/all", purpose, "process 0")
        if self.rank == 0:
            self._forget(name)
        errors = {f"process {i}": e for i, (e, *_) in enumerate(answers) if e is not None}
        if errors:
            same = len(errors) == self.world and len(set(errors.values())) == 1
            kind = Damaged if any(hurt for *_, hurt in answers) else CheckpointError
            raise kind(error if same else "\n".join(f"{who}: {e}" for who, e in errors.items()))
        return [v for _, v, _ in answers]

    def together(self, purpose: str, work: Callable[[], T]) -> T:
        """Do this process's work, then wait for the others; an error on any process is raised on all."""
        error, result, damaged = None, None, False
        try:
            result = work()
        except UserError as problem:
            error, damaged = str(problem), isinstance(problem, Damaged)
        except OSError as problem:
            error = f"{problem}"
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        self.agree(purpose, error, damaged=damaged)
        return result  # pyright: ignore[reportReturnType] (there was no error, so there is a result)

    def part(self, purpose: str, seconds: float = 10.0) -> None:
        """Part before every process ends: process 0, which keeps the store, waits until the others need it no more."""
        if self.world == 1:
            return
        self.store.set(f"mtl/{purpose}/parted/{self.rank}", "1")
        end = time.monotonic() + seconds
        while self.rank == 0 and time.monotonic() < end:
            if self.store.check([f"mtl/{purpose}/parted/{i}" for i in range(self.world)]):
                return
            time.sleep(0.005)

    def _take(self, key: str, purpose: str, who: str) -> Any:
        end, pause = time.monotonic() + self.timeout, 0.001
        while not self.store.check([key]):
            if time.monotonic() > end:
                raise CheckpointError(
                    f"{purpose}: {who} did not report within {self.timeout:.0f} s; it may have died. Nothing was committed."
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return json.loads(self.store.get(key))

    def _forget(self, name: str) -> None:
        """Drop the single answers; the common one stays, since others may still read it."""
        for i in range(self.world):
            self.store.delete_key(f"{name}/{i}")


def peers(timeout: float = WAIT_SECONDS) -> Peers:
    """Find the processes that run together; this one alone where no process group exists."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Peers(timeout=timeout)
    store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore
    return Peers(dist.get_rank(), dist.get_world_size(), store, timeout)
