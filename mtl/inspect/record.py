"""Record what a function does: its operations, what each reads and makes, what it multiplies and sends. Meta tensors take no memory."""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mtl import tree
from mtl.inspect.operations import attention_flops, attention_room, kind_of, matmul_shape
from mtl.sharding.layout import Axes

COLLECTIVES = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}


PARTS = get_decompositions([torch.ops.aten.native_layer_norm, torch.ops.aten.native_layer_norm_backward])
"""What compilers take apart."""


@dataclass(frozen=True)
class Wire:
    """One collective: over which axes, and the bytes of its larger side (what an all-gather gives, what a reduce-scatter takes)."""

    collective: str
    axes: Axes
    bytes: int
    sent: int | None = None
    """Bytes that one device sends, where they do not follow from the collective (a ring's turn sends to one neighbour)."""
    slot: tuple[str, int] | None = None
    """Where the copy engines do it: which kind of slot it takes (gather or sum), and how many bytes of one."""


@dataclass(frozen=True)
class Op:
    """One operation. ``reads``, ``makes`` and ``writes`` are numbers of buffers; ``makes`` are new, ``writes`` existed before."""

    name: str
    kind: str
    scope: str
    layer: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    writes: tuple[int, ...]
    flops: int = 0
    shape: tuple[int, ...] = ()
    wire: Wire | None = None
    moved: int = 0
    """Bytes read and written."""


@dataclass
class Trace:
    """What was recorded: operations in order, the bytes of every buffer, and after which operation each was given up.

    ``parked`` are the bytes of buffers in host memory, which take none on the device.
    """

    ops: list[Op] = field(default_factory=list[Op])
    sizes: dict[int, int] = field(default_factory=dict[int, int])
    freed: dict[int, int] = field(default_factory=dict[int, int])
    inputs: dict[int, str] = field(default_factory=dict[int, str])
    outputs: dict[int, str] = field(default_factory=dict[int, str])
    parked: dict[int, int] = field(default_factory=dict[int, int])


class Recorder(TorchDispatchMode):
    """Writes down every operation that reaches the device while it is entered."""

    def __init__(self, compiled: bool = False) -> None:
        """Start a record; ``compiled`` says that a compiler takes what is recorded: it copies nothing in order to store it."""
        super().__init__()
        self.trace, self.compiled = Trace(), compiled
        self.scope, self.layer = "", -1
        self._known: dict[int, tuple[int, StorageWeakRef]] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        self._ones: set[int] = set()

    @contextlib.contextmanager
    def scoped(self, scope: str, layer: int = -1) -> Generator[None]:
        """Name the part of the program that runs in the block."""
        before = self.scope, self.layer
        self.scope, self.layer = scope, layer
        try:
            yield
        finally:
            self.scope, self.layer = before

    def buffer(self, x: Tensor) -> tuple[int, bool]:
        """Number a tensor's memory; say whether it is new."""
        storage = x.untyped_storage()
        address = storage._cdata  # pyright: ignore[reportPrivateUsage]
        known = self._known.get(address)
        if known is not None:
            return known[0], False
        # The weak reference keeps the address from being given out again.
        index, reference = len(self.trace.sizes), StorageWeakRef(storage)
        self._known[address] = (index, reference)
        self._alive[index] = reference
        self.trace.sizes[index] = storage.nbytes()
        return index, True

    def _alias(self, x: Tensor, index: int) -> None:
        storage = x.untyped_storage()
        address = storage._cdata  # pyright: ignore[reportPrivateUsage]
        self._known.setdefault(address, (index, StorageWeakRef(storage)))
        self._alive[index] = StorageWeakRef(storage)
        self.trace.freed.pop(index, None)

    def label(self, kind: str, values: Any, outputs: bool = False) -> None:
        """Say what some tensors are: arguments of the program, or its results."""
        for path, x in tree.paths(values):
            if isinstance(x, Tensor):
                index, _ = self.buffer(x)
                (self.trace.outputs if outputs else self.trace.inputs)[index] = f"{kind}.{path}" if path else kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and write it down."""
        if self.compiled and func in PARTS:
            with self:
                return PARTS[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        inputs = _tensors(args) + _tensors(tuple((kwargs or {}).values()))
        results = _tensors(out if isinstance(out, tuple | list) else (out,)) or _written(func, args)
        name = func.__name__.partition(".")[0]
        name = f"engine_{name}" if func.namespace == "mtl_engine" else name
        if not results:
            return out
        reads = tuple(dict.fromkeys(self.buffer(x)[0] for x in inputs))
        if name == "wait_tensor" or (self.compiled and self._keeps(name, args)):  # gives the same memory, but on meta tensors a new one
            self._alias(results[0], reads[0])
        numbered = [self.buffer(x) for x in results]
        makes = tuple(dict.fromkeys(i for i, new in numbered if new))
        if name == "park":
            self.trace.parked |= {i: self.trace.sizes[i] for i in makes}
            self.trace.sizes |= dict.fromkeys(makes, 0)
        if name == "ones_like" or (name == "mul" and isinstance(args[1], float) and args[1] == 1.0 and reads[0] in self._ones):
            self._ones |= {*makes}
        kind = kind_of(name, bool(makes))
        mutable = func._schema.is_mutable
        writes = tuple(i for i, new in numbered if not new) if mutable else ()
        shape = matmul_shape(name, args)
        flops = 2 * _product(shape) if shape else attention_flops(name, args, kwargs or {})
        if flops and not shape:
            shape = (inputs[0].shape[-1],)
        moved = 0 if kind == "view" else sum(x.numel() * x.element_size() for x in (*inputs, *results))
        wire = _wire(name, args, results)
        if room := attention_room(name, args):  # what it takes while it runs is a buffer that nothing reads
            self.trace.sizes[index := len(self.trace.sizes)] = room
            self.trace.freed[index] = len(self.trace.ops)
            makes = (*makes, index)
        self.trace.ops.append(Op(name, kind, self.scope, self.layer, reads, makes, writes, flops, shape, wire, moved))
        self.sweep()
        return out

    def _keeps(self, name: str, args: Any) -> bool:
        """Tell whether a compiler makes nothing new: it stores what is a buffer anyway, or multiplies by what it knows to be 1."""
        if name == "mul":
            return isinstance(args[1], Tensor) and args[1].dim() == 0 and self.buffer(args[1])[0] in self._ones
        return name == "stored" and args[0].untyped_storage().nbytes() == args[0].nbytes

    def sweep(self) -> None:
        """Note which buffers nothing holds any more."""
        gone = [i for i, reference in self._alive.items() if reference.expired()]
        for i in gone:
            del self._alive[i]
            self.trace.freed[i] = len(self.trace.ops) - 1

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell Dynamo to compile although this is active."""
        return True


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple | list):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


def _written(func: Any, args: Any) -> list[Tensor]:
    """Find the arguments that an operation without results writes to."""
    kinds = zip(func._schema.arguments, args, strict=False)
    return [x for kind, x in kinds if kind.alias_info is not None and kind.alias_info.is_write and isinstance(x, Tensor)]


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _wire(name: str, args: Any, results: list[Tensor]) -> Wire | None:
    if name in ("engine_gather", "engine_send"):
        whole = (results if name == "engine_gather" else args)[0]
        axes, size = tuple(str(args[-1]).split("+")), whole.numel() * whole.element_size()
        if name == "engine_send":  # its slot takes a part of every member
            return Wire("all_to_all", axes, size, slot=("sum", size))
        return Wire("all_gather", axes, size, slot=("gather", size // args[-2]))
    if name not in COLLECTIVES:
        return None
    group = str(args[-1])
    sizes = [x.numel() * x.element_size() for x in (args[0], results[0])]
    if name != "all_to_all_single":
        return Wire(COLLECTIVES[name], tuple(group.split("+")), max(sizes))
    rows = args[2]
    row = args[0].element_size() * (args[0].numel() // max(args[0].shape[0], 1))
    ring = sum(1 for n in rows if n) == 1
    return Wire("permute" if ring else "all_to_all", tuple(group.split("+")), max(sizes), sum(rows) * row if ring else None)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
