"""How long a step takes: a roofline over its kernels with reached efficiencies, and a ring over its links. An estimate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtl.inspect.hardware import Device
from mtl.inspect.lifetime import Kernel, Life, sums_gradients
from mtl.inspect.mesh import members
from mtl.inspect.record import Wire
from mtl.sharding.mesh import MeshShape

KINDS = ("products", "attention", "other kernels", "communication", "hidden communication")


@dataclass(frozen=True)
class Traffic:
    """What one collective sends from one device, and over which link the slowest part goes."""

    sent: int
    link: str
    seconds: float


def traffic(wire: Wire, mesh: MeshShape, device: Device, beside: bool = False) -> Traffic:
    """Send one collective as rings do: inside a node over its link, between nodes each device through its own port.

    ``beside`` compute, a link inside a node reaches less, since both share the chip.
    """
    group = members(mesh, wire.axes)
    count, near = len(group), sum(1 for d in group if d // device.node_size == 0)
    share, away = (count - 1) / count, (count - near) / count
    twice = 2 if wire.collective == "all_reduce" else 1
    sent = wire.sent if wire.sent is not None else round(twice * wire.bytes * share)
    inside = device.links["node"].bandwidth * device.efficiency["node_beside" if beside else "node"]
    outside = device.links["cluster"].bandwidth * device.efficiency["cluster"]
    if away == 0:
        return Traffic(sent, "node", device.links["node"].latency + sent / inside)
    # All-to-alls go out whole; of the others each byte enters a node once, over the ports of all its members.
    out = sent if wire.collective == "permute" else twice * wire.bytes * away / (1 if wire.collective == "all_to_all" else near)
    return Traffic(sent, "cluster", device.links["cluster"].latency + max(out / outside, sent / inside if near > 1 else 0.0))


def kernel_seconds(kernel: Kernel, device: Device, dtype: str) -> float:
    """Time one kernel: the longer of computing and moving."""
    moving = kernel.bytes / (device.memory_bandwidth * device.efficiency["memory"])
    op = kernel.op
    if op.kind == "matmul":
        return device.launch + max(op.flops / device.products(dtype, op.name == "_scaled_mm"), moving)
    if op.kind == "attention":
        share = device.attention("backward" if "backward" in op.name else "forward", op.shape[0] if op.shape else 128)
        return device.launch + max(op.flops / (device.peak(dtype) * share), moving)
    return device.launch + moving


def seconds(life: Life, mesh: MeshShape, device: Device, dtype: str, overlapped: bool) -> dict[str, float]:
    """Time a record by kind. With ``overlapped``, gathers of weights, sums of gradients and what starts before a product run beside
    compute, in part.

    What copy engines move takes no multiprocessors from the products beside it, and the link reaches what it reaches alone.
    """
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for i, kernel in enumerate(life.kernels):
        op = kernel.op
        if op.wire is None:
            name = {"matmul": "products", "attention": "attention"}.get(op.kind, "other kernels")
            found[name] += kernel_seconds(kernel, device, dtype)
            continue
        kinds = {life.kinds.get(b) for b in (*op.reads, *op.makes)}
        known = kinds & {"gathered weights"} or (kinds & {"gradients"} and sums_gradients(op, life.kinds))
        hides = overlapped and (known or beside_product(life, i))
        beside = bool(hides) and op.wire.slot is None
        found["hidden communication" if hides else "communication"] += traffic(op.wire, mesh, device, beside).seconds
    return found


def beside_product(life: Life, place: int) -> bool:
    """Tell whether a product that needs nothing of a collective's result comes right after it."""
    op, later = life.kernels[place].op, life.kernels[place + 1 : place + 2]
    return op.wire is not None and any(k.op.kind == "matmul" and not {*op.makes} & {*k.op.reads} for k in later)


def combine(parts: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """Add times up, each taken so many times."""
    return {name: max(0.0, sum(w * part[name] for part, w in zip(parts, weights, strict=True))) for name in KINDS}


def exposed(times: Mapping[str, float], device: Device) -> float:
    """Give the communication that compute does not hide: at best ``overlap`` of what can be hidden is."""
    compute = times["products"] + times["attention"] + times["other kernels"]
    hidden = min(times["hidden communication"] * device.efficiency["overlap"], compute)
    return times["communication"] + times["hidden communication"] - hidden
