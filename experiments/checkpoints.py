"""A run that outlives its processes: saves on time and at the end, resumes, and stops on a signal with everything saved."""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.settings import CheckpointSettings
from mtl.checkpoint.background import Saver, describe
from mtl.checkpoint.contents import Contents, inspect
from mtl.checkpoint.files import flush
from mtl.checkpoint.gate import Gate
from mtl.checkpoint.peers import CheckpointError, Damaged, peers
from mtl.checkpoint.restore import restore
from mtl.checkpoint.store import Keep, Store
from mtl.checkpoint.verify import verify
from mtl.errors import UserError, unknown
from mtl.runtime import process
from mtl.runtime.log import RunLog
from mtl.runtime.signals import Signals
from mtl.train.loop import Hook

FOLDER = "checkpoints"
SAME = (("train", "seed"), ("train", "seq_len"), ("train", "global_batch_size"), ("data", "split"), ("data", "order"))
"""Settings that decide which samples a step sees: a resumed run must keep them."""


def claim(folder: Path, resume: str) -> str:
    """Make the run folder, or take one that holds a run if told to; on process 0. Gives the folder and its finished steps as JSON."""
    store = Store(folder / FOLDER)
    held = [name for name in ("config.json", "metrics.jsonl", FOLDER) if (folder / name).exists()]
    if held and resume == "never":
        raise UserError(
            f"--out {folder} holds another run (it has {' and '.join(held)}). Choose another folder, or go on with it by --resume auto; "
            "nothing was changed."
        )
    steps = store.found()
    if resume == "must" and not steps:
        raise UserError(
            f"--resume must: {folder} has no finished checkpoint. Give the --out of the run to go on with, or use --resume auto."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch(exist_ok=bool(held))
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error}.") from None
    store.lock()  # held until this process ends
    store.clean()
    return json.dumps([str(folder), steps])


def check(settings: CheckpointSettings) -> None:
    """Refuse settings that mean nothing."""
    for name in ("every", "every_minutes", "keep", "keep_every", "keep_best"):
        if getattr(settings, name) < 0:
            raise UserError(f"--checkpoint.{name.replace('_', '-')} is {getattr(settings, name)}: it must not be negative.")
    if settings.grace <= 0:
        raise UserError(f"--checkpoint.grace is {settings.grace}: it must be a number of seconds above 0.")
    if settings.host_memory is not None and settings.host_memory <= 0:
        raise UserError(f"--checkpoint.host-memory is {settings.host_memory}: it must be above 0 (GiB), or None for all that a save takes.")
    if (settings.keep_every or settings.keep_best) and not settings.keep:
        raise UserError(
            "--checkpoint.keep-every and --checkpoint.keep-best add to --checkpoint.keep, which is 0 (all stay): set it to at least 1."
        )


def check_metric(settings: CheckpointSettings, record: Mapping[str, Any]) -> None:
    """Refuse a metric that steps do not have; those that begin with eval are looked for where a step was evaluated."""
    here = not settings.metric.startswith("eval") or any(name.startswith("eval") for name in record)
    if settings.keep_best and here and settings.metric not in record:
        raise unknown("metric in --checkpoint.metric", settings.metric, sorted(n for n, x in record.items() if isinstance(x, int | float)))


class Keeper:
    """Saves, resumes and stops one run. ``cursor(step)`` gives what the data needs to go on, as JSON."""

    def __init__(
        self,
        settings: CheckpointSettings,
        folder: Path,
        at: process.Place,
        config: Mapping[str, Any],
        cursor: Callable[[int], Any],
        signals: Signals | None,
    ) -> None:
        """Keep the run in ``folder``; nothing is read or written yet."""
        self.settings, self.folder, self.at = settings, folder, at
        self.config, self.cursor, self.signals = json.loads(json.dumps(config, default=str)), cursor, signals
        self.store, self.group = Store(folder / FOLDER), peers()
        memory = None if settings.host_memory is None else int(settings.host_memory * 2**30)
        self.saver = Saver(memory, on_failure=self._failed)
        self.gate = Gate(0)
        self.extra: Mapping[str, Any] = {}
        self.first, self.run_id, self.resumed = 0, f"{time.time_ns():x}", False
        self.data: Any = None
        self.on_leave: Callable[[], None] = lambda: None
        self._finished, self._ended = threading.Event(), threading.Event()
        self._stopping, self._saving = threading.Event(), threading.Lock()
        self._error: Exception | None = None
        self._saved_at = time.monotonic()

    def begin(
        self, steps: Sequence[int], resume: str, abstract: Callable[[Contents], Any], fresh: Callable[[], Any],
        place: Callable[[Any], Any] = lambda state: state,
    ) -> Any:  # fmt: skip
        """Restore the newest good step and ``place`` its state where it rests, or make a fresh state. Damaged steps are set aside."""
        problems: dict[int, str] = {}
        for step in reversed(steps):
            try:
                contents, state = self._read(step, abstract)
            except Damaged as problem:
                if resume == "must":
                    raise
                problems[step] = str(problem)
                self._warn(f"step {step} is damaged: {problem}")
                continue
            state = place(state)
            for damaged in problems if self.at.rank == 0 else ():
                self._warn(f"step {damaged} is kept as {self.store.set_aside(damaged)}")
            self._go_on(contents, state)
            return state
        for problem in problems.values():
            raise CheckpointError(f"every checkpoint in {self.store.folder} is damaged; the run does not start over by itself. {problem}")
        state = fresh()
        self.gate.state = state
        if self.at.rank == 0:
            cut_metrics(self.folder / "metrics.jsonl", 0)
        return state

    def start(self, state: Any, log: RunLog) -> None:
        """Write config.json and watch for signals from now on, until the process ends."""
        self.on_leave = log.close
        if self.at.rank == 0:
            write_config(self.folder / "config.json", self._whole())
        if self.resumed:
            done = " (all of --train.steps are done)" if self.first == _find(self.config, ("train", "steps")) else ""
            log.say(f"resumed after step {self.first} from {self.store.path(self.first)}{done}")
        if self.at.device.type == "cuda":
            self.saver.prepare(state)
        if self.signals is not None and self.signals.caught is not None:
            self.gate.freeze()  # asked to stop already: no step begins while the watch wakes up
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def before_update(self) -> None:
        """Wait until the state may be written to: it is copied, and no stop is under way."""
        self.saver.fence()
        self.gate.before_update()

    def step_done(self, i: int, state: Any, record: dict[str, Any]) -> None:
        """Note a step: the first hook."""
        self.gate.after_step(i, state, record)

    def save_if_due(self, i: int, state: Any, record: dict[str, Any]) -> None:
        """Save where it is time: the last hook. An error of the save before stops the run here, or is only told of."""
        check_metric(self.settings, record)
        try:
            self.saver.check()
        except CheckpointError:
            if self.settings.on_error == "stop":
                raise
        if not ((self.settings.every and i % self.settings.every == 0) or self._time_is_up(i)):
            return
        with contextlib.ExitStack() as stack:
            if self.settings.on_error == "continue":
                stack.enter_context(contextlib.suppress(CheckpointError))
            self.saver.wait()
        self._save(i, state, record)

    def finish(self) -> None:
        """Save the last state and wait for it; raises if it could not be saved."""
        self._finished.set()
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Give a save under way its time, for a run that ends by an error; one that is being stopped ends by that alone."""
        if self._stopping.is_set():
            threading.Event().wait()  # another process has left already, and what it took part in failed here
        end = time.monotonic() + self.settings.grace
        while self.saver.busy() and time.monotonic() < end:
            time.sleep(0.05)

    def replay(self, state: Any, hooks: Sequence[Hook]) -> None:
        """Run the hooks of the step that was resumed from, where a signal came before they had written its line."""
        if not self.resumed or not self.gate.record:
            return

        def last_line() -> str:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return str(json.loads(lines[-1])["step"] if lines else 0)

        if int(process.on_first_rank(last_line)) < self.first:
            record = dict(self.gate.record)
            for hook in hooks:
                hook(self.first, state, record)

    def _read(self, step: int, abstract: Callable[[Contents], Any]) -> tuple[Contents, Any]:
        path = self.store.path(step)
        contents = inspect(path)
        said = contents.host.get("step") if isinstance(contents.host, dict) else None
        if said != step:
            raise CheckpointError(
                f"{path} was not saved by a run after step {step}: it says step {said}. Move it elsewhere; --init reads it."
            )
        was, now = decided(contents.config), decided(self.config)
        for name in (n for n in now if n in was and was[n] != now[n]):
            raise UserError(
                f"{name} is {now[name]}, but {path} was saved with {was[name]}: a resumed run must keep it. Nothing was changed."
            )
        if (asked := _find(self.config, ("train", "steps"))) < step:
            raise UserError(
                f"--train.steps is {asked}, but {path} holds step {step} already. To train on, give more steps. Nothing was changed."
            )
        if self.settings.verify:
            verify(path)
        return contents, restore(path, abstract(contents))

    def _go_on(self, contents: Contents, state: Any) -> None:
        host = contents.host
        self.first, self.run_id, self.resumed = int(host["step"]), host["run_id"], True
        self.data = host.get("data")
        self.gate = Gate(self.first)
        self.gate.state, self.gate.record = state, host["metrics"]
        self.saver.committed = self.store.path(self.first)
        if self.at.rank == 0:
            cut_metrics(self.folder / "metrics.jsonl", self.first)

    def _save(self, i: int, state: Any, record: Any) -> None:
        with self._saving:  # a signal's thread may come to save the very step that the main thread is saving
            self.saver.wait()
            if self.saver.committed != self.store.path(i) and not self.store.path(i).exists():
                self._start_save(i, state, record)

    def _start_save(self, i: int, state: Any, record: Any) -> None:
        data = self.cursor(i)
        host = {"step": i, "run_id": self.run_id, "data": data, "metrics": record, "seed": _find(self.config, ("train", "seed"))}
        s = self.settings
        keep = Keep(s.keep, s.keep_every, s.keep_best, s.metric)

        def before() -> None:
            if self.at.rank == 0:
                self._bring_log()

        def after() -> None:
            if self.at.rank == 0:
                self.store.prune(keep)

        self.saver.save(self.store.path(i), state, host=host, config=self.config, extra=self.extra, before=before, after=after)
        self._saved_at = time.monotonic()

    def _bring_log(self) -> None:
        """Bring the log to the disk before the checkpoint. Where the run's folder was taken away, say so and make it anew."""
        try:
            if not self.store.held():
                self._warn(f"{self.store.folder} or files in it are gone: somebody removed them, or their disk. It is made anew.")
                self.store.lock()
            if not (self.folder / "config.json").exists():
                write_config(self.folder / "config.json", self._whole())
            flush(self.folder / "metrics.jsonl")
        except (OSError, UserError) as problem:
            self._warn(f"{problem}")

    def _whole(self) -> Mapping[str, Any]:
        return {**self.config, "run_id": self.run_id, "resumed": history(self.folder / "config.json", self)}

    def _time_is_up(self, i: int) -> bool:
        """Ask process 0's clock. It says so a step ahead: that step needs all processes, so the others have the word when they end it."""
        if not self.settings.every_minutes:
            return False
        late = time.monotonic() - self._saved_at > 60 * self.settings.every_minutes
        if self.group.world == 1:
            return late
        if self.at.rank == 0 and late:
            self.group.store.set(f"mtl/timed/{i + 1}", "1")
        return bool(self.group.store.check([f"mtl/timed/{i}"]))

    def _watch(self) -> None:
        stop = self._wait_for_stop(self._finished)
        try:
            self._end(stop)
        except Exception as problem:
            self._error = problem
            if stop:
                self._warn(describe(problem))
                process.leave(1)
        self._ended.set()
        with contextlib.suppress(Exception):  # the store goes away when the run ends
            self._wait_for_stop(threading.Event())
            self._goodbye("after the last step: everything is saved")

    def _wait_for_stop(self, over: threading.Event) -> bool:
        asked = False
        while True:
            caught = self.signals.wait(0.05) if self.signals is not None else time.sleep(0.05)
            stop = caught is not None
            if self.group.world > 1:
                if stop and not asked:
                    self.group.store.set("mtl/stop", "1")
                    asked = True
                stop = bool(self.group.store.check(["mtl/stop"]))
            if stop or over.is_set():
                return stop

    def _end(self, stop: bool) -> None:
        """Bring all processes to the same step and save it; leave if a signal asked for it."""
        answers = self.group.agree("stop", None, [self.gate.freeze(), stop])
        step, stop = max(passed for passed, _ in answers), any(asked for _, asked in answers)
        if stop:
            self._stopping.set()
            timer = threading.Timer(self.settings.grace, self._give_up)
            timer.daemon = True
            timer.start()
        self.gate.allow(step)
        self.gate.wait_done(step, float("inf") if not stop else self.settings.grace)
        try:
            self.saver.wait()
        except CheckpointError as problem:
            self._warn(f"an earlier save failed: {problem}")
        if stop or self.settings.final:
            self._save(step, self.gate.state, self.gate.record)
            self.saver.wait()
        if stop:
            self._goodbye(f"after step {step}: saved in {self.store.path(step)}; --resume auto goes on from there")

    def _goodbye(self, text: str) -> None:
        name = signal.Signals(self.signals.caught).name if self.signals is not None and self.signals.caught else "a signal"
        if self.at.rank == 0:
            with contextlib.suppress(Exception):
                self.on_leave()
            print(f"\nstopped by {name} {text}", flush=True)
        self.group.part("stop")
        process.leave(0)

    def _give_up(self) -> None:
        self._warn(f"not saved within --checkpoint.grace {self.settings.grace:g} s; the newest good step is {self.store.latest()}")
        process.leave(1)

    def _failed(self, text: str) -> None:
        self._warn(f"{text}\nThe newest good step is {self.store.latest()}.")

    def _warn(self, text: str) -> None:
        if self.at.rank == 0:
            print(f"\ncheckpoint: {text}", file=sys.stderr, flush=True)


def cut_metrics(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to a step; a resumed run writes the rest anew."""
    lines: list[str] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        lines.append(line + "\n")
    replace_file(path, "".join(lines))


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write config.json whole or not at all."""
    replace_file(path, json.dumps(config, indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text)
        flush(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. What it held before is as it was.") from None


def history(path: Path, keeper: Keeper) -> list[Any]:
    """Give what config.json says of earlier resumptions, and this one."""
    if not keeper.resumed:
        return []
    try:
        earlier = json.loads(path.read_text()).get("resumed", [])
    except (OSError, ValueError):
        earlier = []
    return [
        *earlier,
        {"step": keeper.first, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "world": keeper.at.world, "torch": torch.__version__},
    ]


def decided(config: Any) -> dict[str, Any]:
    """Collect what decides the samples of a run, as far as its configuration says it: settings, and what its data said of themselves."""
    found = {f"--{'.'.join(names).replace('_', '-')}": _find(config, names) for names in SAME}
    return {name: value for name, value in found.items() if value is not None} | (_find(config, ("decides",)) or {})


def _find(tree: Any, names: Sequence[str]) -> Any:
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
