"""Process start and stop: device, backend, process group; one clear message when something is wrong. The only reader of the environment."""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtl.errors import LocalError, PeerLost, UserError
from mtl.runtime import neighbours

_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport|remote process exited|ncclRemoteError|NCCL communicator was aborted")
BACKENDS = {"cuda": "nccl", "xpu": "xccl", "cpu": "gloo", "mps": "gloo"}


@dataclass(frozen=True)
class Place:
    """Where this process runs among the others."""

    rank: int
    world: int
    local_rank: int
    device: torch.device


def place() -> Place:
    """Find rank, world size and device from what torchrun says and what the machine has."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return Place(rank, world, local, _device(local))


def copy_engines(at: Place) -> bool:
    """Tell whether all processes have GPUs of this host that reach each other's memory, so that copy engines can serve them."""
    if at.device.type != "cuda" or torch.version.hip is not None or not 1 < at.world <= torch.cuda.device_count():
        return False
    here = processes_here() == at.world
    return here and all(torch.cuda.can_device_access_peer(at.local_rank, other) for other in range(at.world) if other != at.local_rank)


def place_rank() -> int:
    """Give this process's rank."""
    return int(os.environ.get("RANK", "0"))


def processes_here() -> int:
    """Count the processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def leave_together(code: int) -> None:
    """End with ``code`` after rank 0 has spoken: torchrun stops all processes as soon as one has left."""
    if code and place_rank():
        time.sleep(3)
    _leave(code)


def prepare_environment(deterministic: bool = False, cache: Path | None = None, tf32: bool = False) -> None:
    """Set what must be set before a process group or a kernel exists; what the user chose stays.

    What the compiler makes is kept in ``cache``, by default TORCHINDUCTOR_CACHE_DIR or the user's own cache folder: torch's default is a
    folder of temporary files, which a restart of the machine empties.
    """
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.absolute())
    elif "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (home := _user_cache()) is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home / "mtl" / "compiled")
    if (folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR")) is not None:  # FlashAttention 4 would compile its kernels in every process
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(Path(folder) / "flash4"))
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # with 8, a receive that waits can hold up other streams, and its sender
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # copy engines need none of it
    if torch.version.cuda and sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # else blocks that fit nothing stay: 5 of 51 GiB
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def process_group(at: Place) -> Generator[None]:
    """Join the other processes (or none, without touching a network) for the time of the block."""
    if at.device.type not in ("cpu", "mps"):
        torch.accelerator.set_device_index(at.device.index)
    backend = BACKENDS.get(at.device.type, "gloo")
    bind = at.device if backend == "nccl" else None
    if at.world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bind)  # pyright: ignore
    else:
        dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=bind)
    over = neighbours.watch(_store().clone(), at.rank, at.world, _left_alone) if at.world > 1 else None
    try:
        yield
    except BaseException:
        if at.world == 1:
            dist.destroy_process_group()
        raise  # among others, tearing down could wait for ranks that wait for this one
    if over is not None:
        over.set()
        dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


def all_agree(flag: bool, at: Place) -> bool:
    """Tell whether a flag holds on every rank."""
    if at.world > 1:
        votes = torch.tensor(int(flag), device=at.device)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return bool(votes.item())
    return flag


def on_first_rank(check: Callable[[], str]) -> str:
    """Run a function on rank 0 and give its result to every rank; its UserError ends all of them."""
    answer: list[tuple[str, str]] = []
    if dist.get_rank() == 0:
        try:
            answer = [("ok", check())]
        except UserError as error:
            answer = [("error", str(error))]
    store = _store()
    if dist.get_world_size() > 1:
        name = f"mtl/{check.__module__}.{check.__qualname__}"
        if dist.get_rank() == 0:
            store.set(name, "\n".join(answer[0]))
        kind, _, text = store.get(name).decode().partition("\n")
        dist.barrier()
        if dist.get_rank() == 0:
            store.delete_key(name)
        dist.barrier()
    else:
        kind, text = answer[0]
    if kind == "error":
        raise UserError(text)
    return text


def guarded(main: Callable[[], None]) -> None:
    """Run a program and end the process.

    A UserError prints one message (on rank 0, or where it is local) and ends with code 2; any other error prints its trace and ends with 1.
    No rank is left waiting: a failing process leaves without tearing the process group down, and torchrun stops the others. Where a
    process is gone, the others find their connections to it closed: one of them says so, unless the process itself did.
    """
    rank = place_rank()
    try:
        main()
        _leave(0)  # without the interpreter's tear-down, in which gloo's threads now and then abort
    except UserError as error:
        found_here = isinstance(error, LocalError) and _first_to_speak()
        if rank == 0 or found_here:
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        leave_together(2)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if lost_peer(error):
            time.sleep(1)  # so that a process that knows what happened speaks first
            if _first_to_speak():
                why = re.sub(r"^\[/\S*\] ", "", str(error)).partition(". ")[0][:200]
                text = str(error) if isinstance(error, PeerLost) else f"another process of the run is gone ({why})."
                print(f"\nerror: {text} All processes end; what the run has saved stays.", file=sys.stderr, flush=True)
            _leave(1)
        _first_to_speak()
        print(f"\nerror on rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        _leave(1)


def lost_peer(error: BaseException) -> bool:
    """Tell whether an error is the end of a connection to another process."""
    return isinstance(error, PeerLost | dist.DistNetworkError) or (isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None)


def _left_alone(rank: int, store: Any) -> None:
    """End where another process of this host is gone, whatever this one waits for, and be it for the store."""
    if _first_to_speak(store):
        print(f"\nerror: process {rank} of the run is gone. All processes end; what the run has saved stays.", file=sys.stderr, flush=True)
    _leave(1)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # pyright: ignore


def _first_to_speak(store: Any = None) -> bool:
    """Ask the store whether no process of this run has printed an error yet; without an answer, yes."""
    try:
        return (store or _store()).add("mtl/errors", 1) == 1
    except (RuntimeError, ValueError):
        return True


def _user_cache() -> Path | None:
    """Find the folder for files that programs keep for this user, if it can be written to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def command_line() -> list[str]:
    """Give the program's arguments."""
    return sys.argv[1:]


def leave(code: int) -> None:
    """End this process now, from any thread."""
    _leave(code)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _device(local_rank: int) -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise UserError(f"process {local_rank} of this machine finds {count} {kind.type} devices: start at most {count} processes here.")
    return torch.device(kind.type, local_rank) if kind.type != "mps" else torch.device("mps")
