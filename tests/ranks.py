"""A pool of gloo ranks for the whole test session: eight processes, forked from one that has imported torch, joined anew for every case."""

import gc
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

WORLD = 8
ROOT = Path(__file__).parent.parent
JOINS = 3
THREADS = 60
"""What a case leaves behind of its groups has threads, which spin once their peers are gone: with more than these the pool is made anew."""
PATIENCE = 20
"""Seconds that other ranks have to answer once one reported an error: they may wait for it without end."""
LOST = "Gloo connectFullMesh failed"
DIED = "the rank died"
"""Without an error of Python. mtl has no compiled code: what dies of it every time is torch's, and once in thousands of cases gloo's."""


class Ranks:
    """Runs ``module:function`` on the first ``world`` ranks; gives rank 0's result. An error on any rank is raised here."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{self.folder.name}/pool")
        self.listener.listen(WORLD)
        self.listener.settimeout(120)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}  # CUDA cannot be forked
        command = [sys.executable, "-m", "tests.ranks", f"{self.folder.name}/pool"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, env=env, start_new_session=True)
        self._renew()

    def _renew(self) -> None:
        """Have the ranks killed, if there are any, and forked anew."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        found = {}
        for _ in range(WORLD):
            connection = self.listener.accept()[0]
            stream = connection.makefile("rw")
            found[int(stream.readline())] = (connection, stream)
        self.streams = [found[i] for i in range(WORLD)]

    def run(self, case: str, world: int, /, **arguments: Any) -> Any:
        """Run one case; arguments and results are JSON. Of thousands of joins gloo loses one, or a rank: that one is done again."""
        return self._run(case, world, world, arguments)

    def capture(self, case: str, world: int, /, **arguments: Any) -> Any:
        """Run one case on one rank whose peers are pretended: its graphs are those of ``world`` ranks, and its numbers mean nothing."""
        return self._run(case, world, 1, arguments)

    def _run(self, case: str, world: int, count: int, arguments: dict[str, Any]) -> Any:
        for _ in range(JOINS):
            answers = self._ask(case, world, count, arguments)
            errors = [f"rank {i}: {a['error']}" for i, a in enumerate(answers) if "error" in a]
            if errors or max(a["threads"] for a in answers) > THREADS:
                self._renew()
            if not errors:
                return answers[0]["result"]
            if not any(LOST in e or DIED in e for e in errors):
                break
            warnings.warn(f"done again: {case} on {count} ranks, {arguments}: {errors[-1][-200:]}", RuntimeWarning, stacklevel=2)
        raise AssertionError("\n".join(errors))

    def _ask(self, case: str, world: int, count: int, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        self.count += 1
        place = {"store": f"{self.folder.name}/store{self.count}", "backend": "gloo" if count == world else "fake"}
        order = json.dumps({"case": case, "world": world, **place, "arguments": arguments})
        for _, stream in self.streams[:count]:
            stream.write(order + "\n")
            stream.flush()
        answers: list[dict[str, Any]] = [{"error": "no answer after another rank's error"} for _ in range(count)]
        waiting = {connection: i for i, (connection, _) in enumerate(self.streams[:count])}
        patience = None
        while waiting and (ready := select.select(list(waiting), [], [], patience)[0]):
            for rank in [waiting.pop(connection) for connection in ready]:
                answer = json.loads(self.streams[rank][1].readline() or json.dumps({"error": DIED}))
                answers[rank] = answer
                patience = PATIENCE if "error" in answer else patience
        return answers

    def close(self) -> None:
        """End all ranks."""
        os.killpg(self.process.pid, 9)
        self.process.communicate()
        self.listener.close()
        self.folder.cleanup()


def _serve(path: str, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    stream = connection.makefile("rw")
    stream.write(f"{rank}\n")
    stream.flush()
    for line in stream:
        order = json.loads(line)
        try:
            store = dist.FileStore(order["store"], order["world"])
            dist.init_process_group(order["backend"], store=store, rank=rank, world_size=order["world"])
            module, _, name = order["case"].partition(":")
            answer = {"result": getattr(importlib.import_module(module), name)(**order["arguments"])}
            dist.destroy_process_group()
            _let_go()
            answer["threads"] = sum(1 for _ in Path("/proc/self/task").glob("*"))
        except BaseException:
            answer = {"error": traceback.format_exc()}
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
        if "error" in answer:
            return


def _let_go() -> None:
    """Forget the meshes that DTensor keeps with layouts and Dynamo with what it compiled: else their groups live on."""
    import torch
    from torch._dynamo.utils import CleanupManager
    from torch.distributed.tensor import _redistribute, debug

    torch._dynamo.reset()
    for code in list(CleanupManager.instance.values):
        CleanupManager.instance._remove_id(code)
    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()
    gc.collect()


def _fork(path: str) -> None:
    """Do once what each rank would do for its first case; for every line of input become eight, in place of those before."""
    import torch
    import torch.testing._internal.distributed.fake_pg

    import tests.cases.graphs  # noqa: F401

    torch.set_num_threads(1)
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(2))  # without a gradient: autograd's threads do not survive a fork
    _let_go()
    gc.freeze()
    children: list[int] = []
    for _ in sys.stdin:
        while children:
            os.kill(children[-1], 9)
            os.waitpid(children.pop(), 0)
        for rank in range(WORLD):
            child = os.fork()
            if child == 0:
                _serve(path, rank)
                os._exit(0)
            children.append(child)


if __name__ == "__main__":
    _fork(sys.argv[1])
