"""Runs of pretrain.py and finetune.py as processes forked from one that has done the slow imports; they can be killed at any instant."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Run:
    """Some processes that train together."""

    def __init__(self, pids: list[int], output: Path) -> None:
        self.pids, self.output = pids, output

    def text(self) -> str:
        """What they have printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def started(self) -> bool:
        """Whether all processes have come as far as to catch signals."""
        return all(Path(f"{self.output}.{rank}").exists() for rank in range(len(self.pids)))

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        """Send a signal to some ranks, by default to all."""
        for i in ranks if ranks is not None else range(len(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[i], number)


class Forks:
    """A parent that forks runs and tells how they ended."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        ours, theirs = socket.socketpair()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
            cwd=ROOT,
            env=env,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.stream = ours.makefile("rw")
        self.count = 0

    def start(
        self, arguments: list[str], ranks: int = 1, program: str = "pretrain", errors: bool = True, behind: bool = False,
        plans: bool = False,
    ) -> Run:  # fmt: skip
        """Start a run of pretrain or finetune; with ``errors`` what it says on stderr is in its text too, else in a file beside it.

        With ``behind`` it tells of every step while the next one's gradient is under way, as on a GPU. With ``plans`` it plans its step
        first, as runs do, which takes as long as all the rest of a short one.
        """
        self.count += 1
        output = Path(self.folder.name) / f"out{self.count}"
        place = str(output) if errors else f"{output}.errors"
        order = {
            "behind": behind,
            "plans": plans,
            "program": program,
            "arguments": arguments,
            "ranks": ranks,
            "output": str(output),
            "errors": place,
            "port": _free_port(),
        }
        return Run(self._ask(order), output)

    def complete(
        self, arguments: list[str], ranks: int = 1, program: str = "pretrain", plans: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, as ``subprocess.run`` does."""
        run = self.start(arguments, ranks, program, errors=False, plans=plans)
        codes = self.wait(run, 240)
        return subprocess.CompletedProcess(arguments, max(codes, key=abs), run.text(), Path(f"{run.output}.errors").read_text())

    def wait(self, run: Run, seconds: float = 120) -> list[int]:
        """Wait for its end: exit codes, negative for signals. What is left then is killed."""
        return self._ask({"wait": run.pids, "seconds": seconds})

    def _ask(self, order: Any) -> Any:
        self.stream.write(json.dumps(order) + "\n")
        self.stream.flush()
        return json.loads(self.stream.readline())

    def close(self) -> None:
        """End everything."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(order: Any, rank: int) -> None:
    """Be one process of a run; a file says when it catches signals, as pretrain.py does from its first line on."""
    from mtl.runtime import signals

    caught = signals.install()
    Path(f"{order['output']}.{rank}").touch()
    for descriptor, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    world = order["ranks"]
    if world > 1:
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order["port"]}
        os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv = [f"{order['program']}.py", *order["arguments"]]
    from experiments import finetune, foretold, pretrain, watching
    from mtl.runtime import process

    if order["behind"]:
        watching.may_wait = lambda setup, at, shape, first, i: True
    if not order["plans"]:
        foretold.foretell = lambda setup, shape, par, options, device, *_: foretold.Foretold(None, "left out", device, 0.0)
    kind = {"pretrain": pretrain.PRETRAIN, "finetune": finetune.FINETUNE}[order["program"]]
    process.guarded(lambda: pretrain.main(caught, kind))


def _end(pids: list[int], seconds: float) -> list[int]:
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _serve(stream: Any) -> None:
    import torch

    from experiments import finetune  # noqa: F401

    torch.set_num_threads(1)
    for line in stream:
        order = json.loads(line)
        if "wait" in order:
            answer: Any = _end(order["wait"], order["seconds"])
        else:
            answer = []
            for rank in range(order["ranks"]):
                pid = os.fork()
                if pid == 0:
                    _child(order, rank)
                    os._exit(0)
                answer.append(pid)
        stream.write(json.dumps(answer) + "\n")
        stream.flush()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])).makefile("rw"))
