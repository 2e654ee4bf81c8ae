"""A run's checkpoints: folders named for their step. Which are committed, which stay, and what an interruption left behind."""

import itertools
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.checkpoint.contents import Contents, inspect
from mtl.checkpoint.files import ITEM, MANIFEST, UNFINISHED, remove, take_lock, unseal
from mtl.checkpoint.peers import CheckpointError

LOCK = ".run.lock"


@dataclass(frozen=True)
class Keep:
    """What stays: the ``last`` newest, every ``every``-th step, and the ``best`` by a metric (the lowest); ``last`` 0 keeps all."""

    last: int = 0
    every: int = 0
    best: int = 0
    metric: str = "eval_loss"


@dataclass(frozen=True)
class Store:
    """The checkpoints under one folder. Only whole ones are listed."""

    folder: Path

    def path(self, step: int) -> Path:
        """Name a step's folder."""
        return self.folder / str(step)

    def found(self) -> list[int]:
        """List the steps that have a checkpoint's folder, oldest first, whole or not: damage must not go unseen."""
        if not self.folder.is_dir():
            return []
        named = (p for p in self.folder.iterdir() if p.name.isdecimal() and str(int(p.name)) == p.name)
        return sorted(int(p.name) for p in named if (p / ITEM).is_dir())

    def steps(self) -> list[int]:
        """List the committed steps, oldest first: those whose list of contents is whole."""
        return [step for step in self.found() if _whole(self.path(step))]

    def latest(self) -> int | None:
        """Give the newest committed step."""
        return max(self.steps(), default=None)

    def set_aside(self, step: int) -> Path:
        """Give a damaged checkpoint another name, so that its step can be saved again and nothing is lost; gives that name."""
        names = (self.path(step).with_name(f"{step}.damaged{f'-{i}' if i else ''}") for i in itertools.count())
        name = next(p for p in names if not p.exists())
        self.path(step).rename(name)
        return name

    def prune(self, keep: Keep) -> list[int]:
        """Remove what need not stay; gives the removed steps. The newest always stays."""
        steps = self.steps()
        if not keep.last or len(steps) <= 1:
            return []
        stay = {*steps[-keep.last :], *(s for s in steps if keep.every and s % keep.every == 0)}
        if keep.best:
            scores = {s: self._metric(s, keep.metric) for s in steps}
            ranked = sorted((score, s) for s, score in scores.items() if score is not None)
            stay |= {s for _, s in ranked[: keep.best]}
        gone = [s for s in steps if s not in stay]
        for step in gone:
            remove(self.path(step))
        return gone

    def clean(self) -> list[str]:
        """Remove what interrupted saves left behind; for the holder of the run's lock alone. Gives the names."""
        left = [p for p in self.folder.glob(f"*{UNFINISHED}") if p.is_dir()]
        left += [p for p in self.folder.iterdir() if p.name.isdecimal() and not any(p.iterdir())] if self.folder.is_dir() else []
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".*.lock"):
            if path.name != LOCK:
                path.unlink(missing_ok=True)
        return sorted(p.name for p in left)

    def lock(self) -> Any:
        """Take the folder for one run, or refuse; gives the function that releases it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return take_lock(self.folder / LOCK, str(self.folder))
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error}.") from None

    def held(self) -> bool:
        """Tell whether the lock that a run took is still there, and not removed with its folder."""
        return (self.folder / LOCK).exists()

    def _metric(self, step: int, name: str) -> float | None:
        try:
            contents: Contents = inspect(self.path(step))
            value = contents.host["metrics"][name]
        except (CheckpointError, KeyError, TypeError):
            return None
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _whole(path: Path) -> bool:
    try:
        unseal(path / ITEM / MANIFEST)
    except CheckpointError:
        return False
    return (path / ITEM / "_METADATA").is_file() and (path / ITEM / "_METADATA").stat().st_size > 0
