"""Check and time every attention kernel that this device has, against the plain one in float32."""

import statistics
from typing import Any

import torch

from mtl.kernels.attention import KERNELS, Mask, attend


def main() -> None:
    """Print one line a kernel and shape."""
    device = torch.device("cuda")
    for length, heads, kv_heads, window in ((512, 8, 2, None), (512, 8, 2, 100), (4096, 32, 8, None), (8192, 32, 8, None)):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, length, n, 128, device=device, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads))
        grad = torch.randn_like(q)
        mask = Mask(True, window)
        want = run(q.float(), k.float(), v.float(), grad.float(), mask, "plain") if length <= 4096 else None
        for name, kernel in KERNELS.items():
            why = kernel.refuses(q, k, mask, None)
            if why or (name == "plain" and length > 512):
                continue
            try:
                got = run(q, k, v, grad, mask, name)
                error = (
                    "-"
                    if want is None
                    else "/".join(f"{((a.float() - b).norm() / b.norm()).item():.1e}" for a, b in zip(got, want, strict=True))
                )
                times = [timed(q, k, v, grad, mask, name) for _ in range(10)]
                forward, both = (statistics.median(t[i] for t in times) for i in (0, 1))
                flops = 4 * 2 * heads * length * length * 128 / 2
                print(
                    f"{name:10s} {length:6d} window {window}  errors out/dq/dk/dv {error}  "
                    f"forward {flops / forward / 1e9:.0f} TFLOP/s  backward {2.5 * flops / (both - forward) / 1e9:.0f} TFLOP/s",
                    flush=True,
                )
            except Exception as problem:
                print(f"{name:10s} {length:6d} FAILED {type(problem).__name__}: {str(problem)[:300]}", flush=True)


def run(q: Any, k: Any, v: Any, grad: Any, mask: Mask, impl: str) -> tuple[Any, ...]:
    """Give output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(leaves[0], leaves[1], leaves[2], mask, None, 128**-0.5, impl)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def timed(q: Any, k: Any, v: Any, grad: Any, mask: Mask, impl: str) -> tuple[float, float]:
    """Give milliseconds of forward, and of forward with backward."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    marks[0].record()
    out = attend(leaves[0], leaves[1], leaves[2], mask, None, 128**-0.5, impl)
    marks[1].record()
    torch.autograd.grad(out, leaves, grad)
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]), marks[0].elapsed_time(marks[2])


if __name__ == "__main__":
    main()
