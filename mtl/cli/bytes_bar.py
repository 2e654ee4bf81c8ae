"""A progress bar over bytes: share done, MB/s, time left. Where the output is no terminal, a line every ten seconds takes its place."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn


class BytesBar:
    """Shown while a with-block lasts; it draws in the caller's thread alone, so that processes can be forked beside it."""

    def __init__(self, what: str) -> None:
        """Take the name to show."""
        self.what = what
        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self._begun = self._told = time.perf_counter()

    def __enter__(self) -> "BytesBar":
        """Start the bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[shown]}"))
        self._bar = Progress(*columns, console=self.console, auto_refresh=False, disable=not self.live)
        self._task = self._bar.add_task(self.what, shown="")
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the bar."""
        self._bar.stop()

    def move(self, done: int, total: int, size: int, begun_at: int = 0) -> None:
        """Show ``done`` of ``total`` bytes; ``size`` is how many bytes of work this process did, ``begun_at`` where it began."""
        now = time.perf_counter()
        if now - self._told < (0.2 if self.live else 10.0):
            return
        self._told = now
        spent = now - self._begun
        left = spent / max(done - begun_at, 1) * (total - done)
        shown = f"{size / 1e6 / spent:,.1f} MB/s  left {_clock(left)}"
        if self.live:
            self._bar.update(self._task, completed=done, total=total, shown=shown, refresh=True)
        else:
            self.console.print(f"{self.what}: {done / max(total, 1):.0%}  {shown}", markup=False)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
