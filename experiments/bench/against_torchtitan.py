"""Train Llama-3-8B with torchtitan on this machine's GPUs, beside mtl: `python experiments/bench/against_torchtitan.py --batch 2`.

Uses torchtitan where it can be imported (0.2.2 was tried; it needs torchdata, datasets, tokenizers and tomli) and installs nothing. Both
train on the built-in text, a token a byte: how much power a product takes, and so how fast a chip at its limit does it, depends on what it
multiplies. Its tokens a second are its own; the MFU here is the causal one of step.py, and the memory is what its allocator holds, in both
programs. mtl's line comes from step.py with the same shape, one after the other.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from experiments.presets import PRESETS
from mtl.data.python_text import python_text
from mtl.errors import UserError
from mtl.models import decoder
from mtl.runtime import process
from mtl.train.speed import flops_per_token, peak_flops

ROW = 20_000
"""Bytes of a document that torchtitan reads."""
FLOAT8 = """
[quantize.linear.float8]
enable_fsdp_float8_all_gather = true
precompute_float8_dynamic_scale_for_fsdp = true
filter_fqns = ["output"]
"""
LINE = re.compile(r"step:\s*(\d+)\s.*?loss:\s*([\d.]+).*?memory:\s*([\d.]+)GiB.*?tps:\s*([\d,]+)")


@dataclass(frozen=True)
class Bench:
    """What both train."""

    devices: int | None = None
    """GPUs; by default all."""
    batch: int = 2
    """Samples a device."""
    seq_len: int = 8192
    remat: Literal["none", "selective", "full"] = "none"
    """Recompute; each library's own meaning of selective."""
    precision: Literal["bf16", "fp8"] = "bf16"
    """fp8: torchtitan's float8 linear layers (needs torchao); mtl's own."""
    tensor: int = 1
    """Devices of tensor parallelism; the others are FSDP's."""
    steps: int = 30
    """torchtitan's steps; the first half warms up."""
    log_freq: int = 4
    """Steps between two lines of torchtitan's log: each has the speed since the last, and waits for the device."""
    ours: bool = True
    """Time mtl too."""
    flags: tuple[str, ...] = ()
    """More of torchtitan's flags."""
    json: Path | None = None


def main() -> None:
    """Run both, and print a line each."""
    bench = tyro.cli(Bench, args=process.command_line())
    count = bench.devices or torch.cuda.device_count()
    if not count:
        raise UserError("no GPU was found: torchtitan trains on GPUs.")
    if importlib.util.find_spec("torchtitan") is None:
        raise UserError("torchtitan cannot be imported: it is not installed here. pip install torchtitan==0.2.2 torchdata datasets")
    with tempfile.TemporaryDirectory() as folder:
        found = theirs(bench, count, Path(folder))
        rows = [found]
        if bench.ours:
            rows.append(ours(bench, count, Path(folder) / "ours.json"))
    for row in rows:
        share = "" if row["mfu"] is None else f"  causal MFU {row['mfu']:.1%}"
        speed = f"{row['tokens_per_second_per_device']:9,.0f} tokens/s/device{share}  holds {row['reserved_memory_gib']} GiB"
        print(f"{row['program']:18s} {bench.precision} seq {bench.seq_len} x {bench.batch} remat {bench.remat}: {speed}", flush=True)
    if len(rows) == 2:
        print(f"mtl / torchtitan: {rows[1]['tokens_per_second_per_device'] / rows[0]['tokens_per_second_per_device']:.3f}", flush=True)
    if bench.json:
        with bench.json.open("a") as file:
            file.write(json.dumps({**dataclasses.asdict(bench), "rows": rows}, default=str) + "\n")


def theirs(bench: Bench, count: int, folder: Path) -> dict[str, Any]:
    """Run torchtitan and read its own log."""
    write_inputs(folder)
    (folder / "run.toml").write_text(settings(bench, folder))
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "torchtitan.train"]
    done = subprocess.run(
        [*program, "--job.config_file", "run.toml", *bench.flags], cwd=folder, capture_output=True, text=True, check=False
    )
    rows = read(done.stdout + done.stderr)
    late = [row for row in rows if row["step"] > bench.steps // 2]
    if not late:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise UserError(f"torchtitan ended with {done.returncode} and timed no steps. Its last lines:\n{tail}")
    speed = statistics.median(row["tokens"] for row in late)
    name = f"torchtitan {importlib.metadata.version('torchtitan')}"
    found = {"program": name, "tokens_per_second_per_device": speed, "mfu": mfu(bench, speed), "reserved_memory_gib": late[-1]["memory"]}
    return {**found, "losses": [row["loss"] for row in rows]}


def read(log: str) -> list[dict[str, float]]:
    """Find the steps in torchtitan's log: number, loss, memory and tokens a second a device."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    found: dict[int, dict[str, float]] = {}
    for line in plain.splitlines():
        if match := LINE.search(line):
            step, loss, memory, speed = match.groups()
            found[int(step)] = {"step": int(step), "loss": float(loss), "memory": float(memory), "tokens": float(speed.replace(",", ""))}
    return [found[step] for step in sorted(found)]


def mfu(bench: Bench, speed: float) -> float | None:
    """Give the causal MFU of a speed, as step.py counts it."""
    config = PRESETS["llama3_8b"].model
    peak = peak_flops(torch.device("cuda", 0))
    return None if peak is None else speed * flops_per_token(decoder.specs(config), config, bench.seq_len) / peak


def ours(bench: Bench, count: int, out: Path) -> dict[str, Any]:
    """Run step.py with the same shape."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else [sys.executable]
    flags = ["--preset", "llama3_8b", "--seq-len", str(bench.seq_len), "--micro-batch-size", str(bench.batch), "--remat", bench.remat]
    mesh = ["--mesh.tensor", str(bench.tensor), "--mesh.fsdp", "-1"] if bench.tensor > 1 else []
    command = [*program, str(Path(__file__).with_name("step.py")), *flags, *mesh, "--precision", bench.precision, "--json", str(out)]
    if subprocess.run(command, check=False).returncode or not out.exists():
        raise UserError("step.py failed; what it printed says why.")
    found = json.loads(out.read_text())
    kept = ("tokens_per_second_per_device", "mfu", "reserved_memory_gib", "peak_memory_gib", "losses", "step_ms_min_max", "first_step_s")
    return {"program": "mtl", **{name: found[name] for name in kept}}


def settings(bench: Bench, folder: Path) -> str:
    """Write torchtitan's settings."""
    converters = 'converters = ["quantize.linear.float8"]\n' if bench.precision == "fp8" else ""
    return f"""[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "{folder}/tokenizer"
{converters}
[training]
dataset = "c4_test"
dataset_path = "{folder}/text"
local_batch_size = {bench.batch}
seq_len = {bench.seq_len}
steps = {bench.steps}

[parallelism]
tensor_parallel_degree = {bench.tensor}

[optimizer]
lr = 3e-4

[lr_scheduler]
warmup_steps = 200

[metrics]
log_freq = {bench.log_freq}

[compile]
enable = true
components = ["model", "loss"]

[activation_checkpoint]
mode = "{bench.remat}"
{FLOAT8 if bench.precision == "fp8" else ""}"""


def write_inputs(folder: Path) -> None:
    """Write the built-in text, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: PLC0415 - torchtitan needs it, mtl does not

    text = python_text()[0].tobytes()
    rows = [text[i : i + ROW].decode(errors="ignore") for i in range(0, len(text), ROW)]
    (folder / "text").mkdir()
    (folder / "tokenizer").mkdir()
    lines = (json.dumps({"text": row, "timestamp": "", "url": ""}) + "\n" for row in rows)
    (folder / "text" / "data.json").write_text("".join(lines))
    tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special, letters = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    size = len(special) + len(letters)
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=letters))
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    about = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about))


if __name__ == "__main__":
    process.guarded(main)
