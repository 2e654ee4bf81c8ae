"""How much host memory do import and export take? `python experiments/bench/hf_memory.py --gigabytes 4 --folder DIR [--ranks 2]`.

Makes a folder of random bf16 weights in Llama's shape, takes it through `mtl hf import` and `mtl hf export` in fresh processes, compares
the bits, and prints each one's time and the largest resident size of a process, file pages included.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from mtl import tree
from mtl.models import decoder
from mtl.models.decoder import Config
from mtl.models.hf import export
from mtl.models.hf.family import write_config
from mtl.runtime.process import command_line, guarded


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    gigabytes: float = 4.0
    """About how large the weights are."""
    folder: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the files go for the time of the run (three times the weights); by default a temporary folder."""
    ranks: int = 1
    """Processes that import and export together."""
    shard_size: str = "1GB"


def main() -> None:
    """Make the folder, run both commands, print a line each."""
    settings = tyro.cli(Settings, args=command_line(), description=__doc__)
    place = Path(tempfile.mkdtemp(prefix="hf_memory", dir=settings.folder))
    try:
        largest = make(place / "hf", settings)
        bound = 1 + 2 * largest / 2**30
        many = ["torch.distributed.run", "--nproc-per-node", str(settings.ranks), "-m"] if settings.ranks > 1 else []
        start = [sys.executable, "-m", *many]
        for name, words in {
            "import": [str(place / "hf"), "--out", str(place / "ckpt")],
            "export": [str(place / "ckpt"), "--out", str(place / "back"), "--shard-size", settings.shard_size],
        }.items():
            seconds, peak = measured([*start, "mtl.cli.main", "hf", name, *words])
            print(f"{name}: {seconds:.1f} s, largest process {peak:.2f} GiB (1 GiB and two largest tensors: {bound:.2f} GiB)", flush=True)
        same = all(filecmp.cmp(f, place / "back" / f.name, shallow=False) for f in (place / "hf").iterdir())
        print("the exported files are bitwise those imported" if same else "the exported files DIFFER", flush=True)
    finally:
        shutil.rmtree(place)


def make(folder: Path, settings: Settings) -> int:
    """Write the synthetic model; gives the bytes of its largest tensor."""
    layer, around = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 32000 * 4096
    layers = max(1, round((settings.gigabytes * 5e8 - around) / layer))
    config = Config(32000, layers, 4096, 32, 32, 11008, 128, max_positions=4096)
    family, values = write_config(config, None)
    specs = dict(tree.paths(decoder.specs(config)))
    wanted = export.tensors(family, config, dict.fromkeys(specs, torch.bfloat16))
    files, rng = export.shards(wanted, export.parse_size(settings.shard_size)), torch.Generator().manual_seed(0)

    def read(path: str, layer: int | None) -> Tensor:
        shape = specs[path].shape if layer is None else specs[path].shape[1:]
        return torch.randint(-(2**15), 2**15, shape, generator=rng, dtype=torch.int16).bitwise_and_(-2049).view(torch.bfloat16)

    partial = export.begin(folder)
    for name, group in files.items():
        export.write_tensors(partial / name, group, read)
    values = {**values, "torch_dtype": "bfloat16"}
    export.commit(folder, files, {"config.json": (json.dumps(values, indent=2) + "\n").encode()})
    total, largest = sum(t.bytes for t in wanted), max(t.bytes for t in wanted)
    print(f"{total / 1e9:.2f} GB in {len(files)} files, {layers} layers, largest tensor {largest / 2**20:.0f} MiB", flush=True)
    return largest


def measured(words: list[str]) -> tuple[float, float]:
    """Run a command; gives its seconds and the most GiB that it, or a process it waited for, held."""
    begun = time.perf_counter()
    child = subprocess.Popen(words)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} ended with status {status}")
    return time.perf_counter() - begun, used.ru_maxrss / 2**20


if __name__ == "__main__":
    guarded(main)
