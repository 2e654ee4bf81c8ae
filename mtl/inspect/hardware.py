"""Device tables: peaks, memory, links and reached efficiencies, read from JSON files. Where an efficiency comes from is in ``sources``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.errors import UserError, unknown

SHARES = ("matmul", "attention_forward", "attention_backward", "memory", "node", "node_beside", "cluster", "overlap")
"""What a table's efficiency says: shares of the peaks, and how much of the communication beside compute is hidden."""
FOLDER = Path(__file__).parent / "devices"


@dataclass(frozen=True)
class Link:
    """A link between devices: bytes a second in one direction of one device, and seconds that a collective takes at least."""

    name: str
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Device:
    """One kind of device and what it reaches. ``efficiency`` has shares of the peaks; attention's are by head size."""

    name: str
    match: tuple[str, ...]
    peak_flops: Mapping[str, float]
    memory_bytes: int
    memory_bandwidth: float
    node_size: int
    links: Mapping[str, Link]
    efficiency: Mapping[str, Any]
    launch: float
    workspace_bytes: int
    sources: Mapping[str, str]

    @property
    def reaches_peers(self) -> bool:
        """Tell whether the devices of a node read each other's memory by their copy engines: NVIDIA's with NVLink do."""
        return self.links["node"].name.startswith("NVLink")

    def peak(self, dtype: str) -> float:
        """Give the dense peak for a compute type."""
        if dtype not in self.peak_flops:
            raise UserError(f"device table {self.name!r} has no peak_flops for {dtype}: it has {', '.join(self.peak_flops)}.")
        return self.peak_flops[dtype]

    def products(self, dtype: str, fp8: bool = False) -> float:
        """Give the operations a second that matrix products reach; where the table has no fp8 peak, those of ``dtype``."""
        if fp8 and "float8_e4m3fn" in self.peak_flops:
            return self.peak_flops["float8_e4m3fn"] * self.efficiency.get("matmul_fp8", self.efficiency["matmul"])
        return self.peak(dtype) * self.efficiency["matmul"]

    def attention(self, direction: str, head: int) -> float:
        """Give attention's share of the peak for the nearest head size that was measured."""
        table: Mapping[str, float] = self.efficiency[f"attention_{direction}"]
        return table[min(table, key=lambda size: abs(int(size) - head))]


def names() -> list[str]:
    """List the devices that come with the library."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> Device:
    """Load a device by name, or from a JSON file of the same form (`experiments/bench/calibrate.py` writes one)."""
    path = Path(name) if name.endswith(".json") or "/" in name else FOLDER / f"{name}.json"
    if path.parent == FOLDER and name not in names():
        raise unknown("device", name, names())
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        links = {key: Link(**link) for key, link in values.pop("links").items()}
        fields: dict[str, Any] = {**values, "match": tuple(values["match"]), "links": links}
        device = Device(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read the device table {path}: {error}. It needs the keys of mtl/inspect/devices/h200.json.") from None
    check(device, path)
    return device


def check(device: Device, path: Path) -> None:
    """Refuse a table whose numbers cannot be."""
    lacking = {"node", "cluster"} - set(device.links)
    lacking |= set(SHARES) - set(device.efficiency)
    if lacking:
        raise UserError(f"device table {path}: links or efficiency lack {', '.join(sorted(lacking))}.")
    for name, share in device.efficiency.items():
        for value in share.values() if isinstance(share, dict) else [share]:
            if not 0 < value <= 1:
                raise UserError(f"device table {path}: efficiency {name} is {value}, but a share lies over 0 and up to 1.")
    if device.node_size < 1 or device.memory_bytes < 1 or device.memory_bandwidth <= 0:
        raise UserError(f"device table {path}: node_size, memory_bytes and memory_bandwidth must be positive.")


def named_like(words: str) -> Device | None:
    """Find the table of a device that calls itself so ("NVIDIA H200"), or None."""
    found = words.replace("-", " ").split()
    return next((d for d in map(load, names()) if any(word in found for word in d.match)), None)
