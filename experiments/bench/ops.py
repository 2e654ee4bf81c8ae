"""Time every op with each implementation beside the best alternative and the device's bound: `python experiments/bench/ops.py`.

One table, and with --json FILE one object a row. TFLOP/s and GB/s count what the op must do, not what an implementation does; the bound is
the device's peak, or its memory bandwidth over what must be read and written. A star marks what "auto" takes.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.func import vjp

import sharding_rules
from experiments.bench.alternatives import packed_alternatives, square_alternatives, torch_adamw, torch_head
from experiments.bench.flags import check_counts, check_file
from experiments.provenance import provenance
from mtl import tree
from mtl.errors import UserError
from mtl.inspect import hardware
from mtl.kernels.attention import KERNELS, attend, choose
from mtl.kernels.masks import Documents, Mask
from mtl.ops.cross_entropy import cross_entropy
from mtl.ops.norm import rms_norm
from mtl.ops.rotary import angles, rotate
from mtl.optim.optimizers import adamw
from mtl.optim.transforms import clip, sum_of_squares
from mtl.runtime import process
from mtl.runtime.compile import compiled
from mtl.sharding.mesh import MeshShape, make_mesh
from mtl.sharding.parallel import Parallel

SLEEP = 10_000_000
"""Cycles of the device, about 5 ms."""
Name = Literal["attention", "packed", "norm", "rotary", "swiglu", "head", "optimizer"]


@dataclass(frozen=True)
class Bench:
    """Time each op beside its alternatives: forward alone, and with backward."""

    only: tuple[Name, ...] = ("attention", "packed", "norm", "rotary", "swiglu", "head", "optimizer")
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """Of attention; each row has as many sequences as make 32768 tokens at most."""
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    """Of attention and rotary positions."""
    documents: int = 8
    """Documents in a packed sequence, of unequal lengths."""
    tokens: int = 8192
    """Of all but attention."""
    embed: int = 4096
    mlp: int = 14336
    vocab: int = 128256
    """Of the head with its cross-entropy."""
    optimized: float = 2.0
    """Billions of parameters that the optimizer updates."""
    rounds: int = 10
    """Each time is the median of so many."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Append the rows to a file, an object a line."""


class Way(NamedTuple):
    """One implementation: ``forward()`` and, where there is one, ``both()`` (forward and backward)."""

    name: str
    forward: Callable[[], Any] | None
    both: Callable[[], Any]
    auto: bool = False


class Case(NamedTuple):
    """An op on one shape: operations forward and forward with backward, or bytes; the larger part counts."""

    op: str
    shape: str
    flops: tuple[float, float]
    bytes: tuple[float, float]
    ways: Callable[[], Iterator[Way]]


def check(bench: Bench) -> None:
    """Refuse shapes that no op has."""
    check_counts(bench, 1, "lengths", "heads", "kv_heads", "head_size", "documents", "tokens", "embed", "mlp", "vocab", "rounds")
    check_file(bench.json)
    if bench.heads % bench.kv_heads:
        raise UserError(f"--heads {bench.heads} does not divide by --kv-heads {bench.kv_heads}: every key head serves equally many.")
    if "rotary" in bench.only and bench.head_size % 2:
        raise UserError(f"--head-size is {bench.head_size}: rotary positions need an even head size. Leave rotary out of --only.")
    if not 0 < bench.optimized < math.inf:
        raise UserError(f"--optimized is {bench.optimized}: it must be a number above 0 (billions of parameters).")


def main() -> None:
    """Print the table as it comes."""
    bench = tyro.cli(Bench, args=process.command_line())
    check(bench)
    at = process.place()
    process.prepare_environment()
    with process.process_group(at):
        table = hardware.named_like(torch.cuda.get_device_name(at.device)) if at.device.type == "cuda" else None
        heads = ("forward", "with back", "reaches", "of bound", "of best", "extra")
        print(f"{'op':10s} {'shape':38s} {'impl':18s} " + "{:>10s} {:>10s} {:>14s} {:>9s} {:>8s} {:>10s}".format(*heads))
        for case in cases(bench, at.device):
            for row in measured(bench, case, at.device, table):
                print(said(row), flush=True)
                if bench.json:
                    with bench.json.open("a") as file:
                        stamp = {"date": time.strftime("%Y-%m-%d"), **provenance()}
                        file.write(json.dumps({**row, **dataclasses.asdict(bench), **stamp}, default=str) + "\n")


def measured(bench: Bench, case: Case, device: torch.device, table: hardware.Device | None) -> list[dict[str, Any]]:
    """Time each way of a case."""
    rows: list[dict[str, Any]] = []
    for way in case.ways():
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "impl": way.name, "auto": way.auto, "error": None}
        try:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            row["both_ms"] = clock(way.both, bench.rounds, device)
            row["forward_ms"] = None if way.forward is None else clock(way.forward, bench.rounds, device)
            row["extra_gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30 if device.type == "cuda" else None
        except Exception as error:  # a kernel that fails here is a row of the table
            row |= {"both_ms": None, "forward_ms": None, "extra_gib": None, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        rows.append(row | rates(case, row, table))
    best = min((r["both_ms"] for r in rows if r["both_ms"]), default=None)
    return [r | {"of_best": best / r["both_ms"] if best and r["both_ms"] else None} for r in rows]


def rates(case: Case, row: dict[str, Any], table: hardware.Device | None) -> dict[str, Any]:
    """Say what a row reaches, and of which bound."""
    if not row["both_ms"]:
        return {"tflops": None, "gbytes": None, "of_bound": None}
    seconds = row["both_ms"] / 1e3
    tflops = case.flops[1] / seconds / 1e12 if case.flops[1] else None
    gbytes = case.bytes[1] / seconds / 1e9
    if table is None:
        return {"tflops": tflops, "gbytes": gbytes, "of_bound": None}
    bound = max(case.flops[1] / table.peak("bfloat16"), case.bytes[1] / table.memory_bandwidth)
    return {"tflops": tflops, "gbytes": gbytes, "of_bound": bound / seconds}


def said(row: dict[str, Any]) -> str:
    """Write a row."""
    name = f"{row['impl']}{'*' if row['auto'] else ''}"
    if row["error"]:
        return f"{row['op']:10s} {row['shape']:38s} {name:18s} {row['error'][:90]}"
    forward = "-" if row["forward_ms"] is None else f"{row['forward_ms']:.3f} ms"
    reaches = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else f"{row['gbytes']:.0f} GB/s"
    bound = "-" if row["of_bound"] is None else f"{row['of_bound']:.1%}"
    extra = "-" if row["extra_gib"] is None else f"{row['extra_gib']:.2f} GiB"
    return (
        f"{row['op']:10s} {row['shape']:38s} {name:18s} {forward:>10s} {row['both_ms']:7.3f} ms {reaches:>14s} {bound:>9s} "
        f"{row['of_best']:8.1%} {extra:>10s}"
    )


def clock(run: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Give the median milliseconds of a run, after two to warm up."""
    times: list[float] = []
    for i in range(rounds + 2):
        if device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(SLEEP)  # pyright: ignore[reportPrivateUsage] - so the device begins when it was told everything, as within a step
            marks[0].record()
            run()
            marks[1].record()
            torch.cuda.synchronize()
            spent = marks[0].elapsed_time(marks[1])
        else:
            start = time.perf_counter()
            run()
            spent = (time.perf_counter() - start) * 1e3
        times += [spent] if i > 1 else []
    return statistics.median(times)


def cases(bench: Bench, device: torch.device) -> Iterator[Case]:
    """List what is asked for."""
    if "attention" in bench.only:
        for length in bench.lengths:
            yield attention_case(bench, device, length, None)
    if "packed" in bench.only:
        for length in bench.lengths:
            yield attention_case(bench, device, length, bench.documents)
    small = {"norm": norm_case, "rotary": rotary_case, "swiglu": swiglu_case, "head": head_case, "optimizer": optimizer_case}
    for name, make in small.items():
        if name in bench.only:
            yield make(bench, device)


def attention_case(bench: Bench, device: torch.device, length: int, documents: int | None) -> Case:
    """Causal attention of whole rows, or of rows of documents that do not see each other."""
    rows = max(1, min(8, 32768 // length))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = (bench.heads, bench.kv_heads, bench.kv_heads)
    q, k, v = (torch.randn(rows, length, n, bench.head_size, device=device, dtype=dtype).requires_grad_() for n in counts)
    grad, scale, mask = torch.randn_like(q), bench.head_size**-0.5, Mask(True)
    ends = torch.tensor([[length]] * rows, device=device) if documents is None else unequal(length, documents, rows, device)
    sizes = torch.diff(ends, prepend=torch.zeros_like(ends[:, :1])).double()
    pairs = float((sizes * (sizes + 1) / 2).sum())
    flops = 4.0 * pairs * bench.heads * bench.head_size
    held = None if documents is None else Documents(ends, ends)

    def ways() -> Iterator[Way]:
        chosen = choose("auto", q, k, mask, held)
        for name, kernel in KERNELS.items():
            if kernel.refuses(q, k, mask, held) or (name == "plain" and device.type == "cuda" and length > 2048):
                continue
            yield way(name, lambda name=name: attend(q, k, v, mask, held, scale, name), (q, k, v), grad, kernel is chosen)
        others = square_alternatives(q, k, v, scale) if documents is None else packed_alternatives(q, k, v, ends, scale)
        for name, run in others.items():
            yield way(name, run, (q, k, v), grad)

    moved = sum(x.numel() * x.element_size() for x in (q, q, k, v))
    what = f"{rows} x {length}, {bench.heads}/{bench.kv_heads} heads of {bench.head_size}"
    return Case("attention" if documents is None else f"packed {documents}", what, (flops, 3.5 * flops), (moved, 3.0 * moved), ways)


def unequal(length: int, documents: int, rows: int, device: torch.device) -> Tensor:
    """Cut rows at places drawn once, the same every time."""
    generator = torch.Generator().manual_seed(0)
    cuts = [torch.randperm(length - 1, generator=generator)[: documents - 1].sort().values + 1 for _ in range(rows)]
    return torch.stack([torch.cat([cut, torch.tensor([length])]) for cut in cuts]).to(device)


def way(name: str, run: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor, auto: bool = False) -> Way:
    """Make a way of an eager op."""
    return Way(name, lambda: run().detach(), lambda: torch.autograd.grad(run(), leaves, grad), auto)


def functional(
    name: str, fn: Callable[..., Tensor], args: tuple[Tensor, ...], grad: Tensor, auto: bool = False, fixed: tuple[Tensor, ...] = (),
    compile: bool = True,
) -> Way:  # fmt: skip
    """Make a way of a pure function of ``args`` and ``fixed`` (which take no gradient), compiled as in a step or alone."""

    def pullback(grad: Tensor, args: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Any:
        return vjp(lambda *values: fn(*values, *fixed), *args)[1](grad)

    forward, both = (compiled(fn), compiled(pullback)) if compile else (fn, pullback)
    return Way(name, lambda: forward(*args, *fixed), lambda: both(grad, args, fixed), auto)


def activations(bench: Bench, device: torch.device, *sizes: int) -> list[Tensor]:
    """Draw a pair of values and gradient for each size."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(1, bench.tokens, size, device=device, dtype=dtype) for size in sizes]


def norm_case(bench: Bench, device: torch.device) -> Case:
    """RMSNorm."""
    x, grad = activations(bench, device, bench.embed, bench.embed)
    weight = torch.ones(bench.embed, device=device, dtype=torch.float32)
    size = x.numel() * x.element_size()

    def torch_norm(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (bench.embed,), w.to(x.dtype), 1e-5)

    def ways() -> Iterator[Way]:
        yield functional("mtl, compiled", lambda x, w: rms_norm(x, w, 1e-5), (x, weight), grad, True)
        yield functional("torch, compiled", torch_norm, (x, weight), grad)
        yield functional("torch", torch_norm, (x, weight), grad, compile=False)

    return Case("norm", f"{bench.tokens} x {bench.embed}", (0.0, 0.0), (2.0 * size, 5.0 * size), ways)


def rotary_case(bench: Bench, device: torch.device) -> Case:
    """Queries and keys turned by their positions."""
    heads = bench.heads + bench.kv_heads
    x, grad = (y.unflatten(-1, (heads, bench.head_size)) for y in activations(bench, device, *[heads * bench.head_size] * 2))
    cos, sin = angles(torch.arange(bench.tokens, device=device).unsqueeze(0), bench.head_size, 500000.0)
    size = x.numel() * x.element_size()

    def ways() -> Iterator[Way]:
        for pairs in ("half", "interleaved"):
            yield functional(f"mtl, {pairs}", partial(rotate, pairs=pairs), (x,), grad, True, (cos, sin))
        yield functional("mtl, not compiled", rotate, (x,), grad, False, (cos, sin), compile=False)

    return Case("rotary", f"{bench.tokens} x {heads} x {bench.head_size}", (0.0, 0.0), (2.0 * size, 4.0 * size), ways)


def swiglu_case(bench: Bench, device: torch.device) -> Case:
    """The gate of the MLP."""
    gate, up, grad = activations(bench, device, *[bench.mlp] * 3)
    size = gate.numel() * gate.element_size()

    def ways() -> Iterator[Way]:
        yield functional("mtl, compiled", lambda g, u: F.silu(g) * u, (gate, up), grad, True)
        yield functional("torch", lambda g, u: F.silu(g) * u, (gate, up), grad, compile=False)

    return Case("swiglu", f"{bench.tokens} x {bench.mlp}", (0.0, 0.0), (3.0 * size, 8.0 * size), ways)


def alone(device: torch.device, **sizes: int) -> Parallel:
    """Stand alone."""
    return Parallel(make_mesh(MeshShape(), device.type), sharding_rules.load("single"), sizes)


def head_case(bench: Bench, device: torch.device) -> Case:
    """The head's product and the loss, with gradients of both."""
    (x,) = activations(bench, device, bench.embed)
    w = torch.randn(bench.embed, bench.vocab, device=device, dtype=torch.float32) * bench.embed**-0.5
    targets = torch.randint(0, bench.vocab, (1, bench.tokens), device=device)
    weights = torch.ones(1, bench.tokens, device=device)
    par = alone(device, embed=bench.embed, vocab=bench.vocab, batch=1, seq=bench.tokens, residual_seq=bench.tokens)
    flops = 2.0 * bench.tokens * bench.embed * bench.vocab
    size = w.numel() * 2.0

    def ways() -> Iterator[Way]:
        one = torch.ones((), device=device)

        def loss(x: Tensor, w: Tensor, targets: Tensor, weights: Tensor, impl: str) -> Tensor:
            return cross_entropy(par, "DV", x, w, targets, weights, impl=impl)[0]

        for impl in ("auto", "fused", "plain"):
            yield functional(f"mtl {impl}", partial(loss, impl=impl), (x, w), one, impl == "auto", (targets, weights))
        yield functional("torch, compiled", torch_head, (x, w), one, fixed=(targets,))

    return Case("head", f"{bench.tokens} x {bench.embed} x {bench.vocab}", (flops, 3 * flops), (size, 3 * size), ways)


def optimizer_case(bench: Bench, device: torch.device) -> Case:
    """AdamW after clipping: gradients are read for their norm, then gradients, parameters and both moments, which are written."""
    width = 4096 if bench.optimized >= 0.1 else 64
    count = max(1, round(bench.optimized * 1e9 / 8 / width**2)) * width**2
    make: Any = lambda: {str(i): torch.randn(count // width, width, device=device) * 0.02 for i in range(8)}  # noqa: E731
    params, grads = make(), make()
    mask = dict.fromkeys(params, True)
    rate, good = torch.tensor(3e-4, device=device), torch.tensor(True, device=device)

    def ways() -> Iterator[Way]:
        for impl in ("plain", "fused"):
            optimizer = adamw(mask, impl=impl)
            state = optimizer.init(params)

            def update(params: Any, grads: Any, state: Any, rate: Tensor, good: Tensor, optimizer: Any = optimizer) -> Tensor:
                norm = sum_of_squares(tree.leaves(grads), [1] * 8).sqrt()
                after = optimizer.update(clip(grads, norm, 1.0), state, params, rate, good)
                for old, new in zip(tree.leaves((params, state)), tree.leaves(after), strict=True):
                    if old is not new:
                        old.copy_(new)
                return norm

            run = compiled(update) if optimizer.compiles else update
            yield Way(f"mtl {impl}", None, lambda run=run, state=state: run(params, grads, state, rate, good), impl == "plain")
            del state
        yield Way("torch", None, torch_adamw(list(params.values()), list(grads.values())))

    total = 8 * count
    return Case("optimizer", f"{total / 1e9:.2f} B in float32", (0.0, 0.0), (0.0, 32.0 * total), ways)


if __name__ == "__main__":
    process.guarded(main)
