"""What a person and a program see of a run: a progress bar, metrics.jsonl, and wandb where asked."""

import importlib
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """The run's outputs; on any rank but the first it does nothing."""

    def __init__(self, folder: Path, first: bool, steps: int, wandb: Mapping[str, Any] | None = None, done: int = 0) -> None:
        """Open the folder's metrics.jsonl and the bar. ``wandb`` holds wandb.init's arguments, None switches it off.

        ``done`` steps were taken before.
        """
        self.first = first
        self.console = Console(quiet=not first, highlight=False)
        if not first:
            return
        self._path = folder / "metrics.jsonl"
        self._file = self._path.open("ab", buffering=0)
        self._unwritten, self._complained = b"", False
        self._wandb: Any = importlib.import_module("wandb").init(dir=folder, **wandb) if wandb is not None else None
        self._live = sys.stdout.isatty()
        self._told = 0.0
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TaskProgressColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=not self._live,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=done, shown="")
        self._begun, self._steps, self._done = time.perf_counter(), steps, done
        self._bar.start()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one step's record to metrics.jsonl (and wandb) and move the bar."""
        if not self.first:
            return
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        self._append(json.dumps(finite, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if v is not None}, step=record["step"])
        shown = f"loss {record['loss']:.4f}  {record['tokens_per_second_per_device']:,.0f} tokens/s"
        if record.get("epochs"):
            shown += f"  epoch {_span(record['epochs'].values())}"
        if "eval_loss" in record:
            bits = f", {record['eval_bits_per_byte']:.3f} bits per byte" if "eval_bits_per_byte" in record else ""
            test = f"; test loss {record['test_loss']:.4f}" if "test_loss" in record else ""
            self.say(f"step {record['step']}: held-out loss {record['eval_loss']:.4f}{bits}{test}")
        self._bar.update(self._task, completed=record["step"], shown=shown)
        now = time.perf_counter()
        if not self._live and (now - self._told > 10 or record["step"] == self._steps):
            left = (now - self._begun) / max(record["step"] - self._done, 1) * (self._steps - record["step"])
            self.say(f"step {record['step']}/{self._steps}  {shown}  left {left:.0f} s")
            self._told = now

    def close(self) -> None:
        """End the bar and close what is open."""
        if self.first:
            self._bar.stop()
            self._append("")
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _append(self, line: str) -> None:
        """Write a line. What a full disk does not take goes with the next; a file that was taken away is made anew."""
        self._unwritten += line.encode()
        try:
            if not self._path.exists():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file.close()
                self._file = self._path.open("ab", buffering=0)
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._complained = False
        except OSError as error:
            if not self._complained:
                self.say(f"{self._path} cannot be written ({error.strerror}): its lines are kept in memory and tried again with each step")
            self._complained = True


def _span(values: Iterable[float]) -> str:
    """Show the epochs of a blend's corpora from the least seen to the most."""
    ordered = sorted(values)
    return f"{ordered[0]:.3g}" if len(ordered) == 1 else f"{ordered[0]:.3g} to {ordered[-1]:.3g}"
