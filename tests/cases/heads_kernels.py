"""The kernel that turns heads, against plain operations in float64: by Triton's interpreter in a process of its own, or on a GPU."""

import torch

from mtl.kernels import heads, heads_triton


def check(device: str) -> None:
    """Both ways, both kinds of pairs, every number of the result written, gradients whose heads lie apart or whose numbers do."""
    torch.manual_seed(0)
    for kind, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for pairs in ("half", "interleaved"):
            for batch, seq, count, kv, size in ((2, 5, 4, 2, 8), (1, 7, 8, 8, 12), (2, 3, 3, 1, 16), (1, 70, 32, 8, 128)):
                y = torch.randn(batch, seq, (count + 2 * kv) * size, device=device).to(kind)
                cos, sin = torch.randn(2, 1, seq, size // 2, device=device)
                rows = heads._by_token(y, cos, sin)  # pyright: ignore[reportPrivateUsage]
                exact = [x.cpu().double() for x in (y, cos, sin)]
                parts = [torch.full((batch, seq, n, size), torch.nan, device=device, dtype=kind) for n in (count, kv, kv)]
                heads_triton.move(y, *parts, *rows, pairs, back=False)
                for found, want in zip(parts, heads.apart(*exact, count, kv, pairs), strict=True):
                    torch.testing.assert_close(found.cpu().double(), want, rtol=near, atol=near)
                assert torch.equal(parts[2].flatten(2), y[..., (count + kv) * size :])
                grads = [
                    torch.randn(batch, seq, size, count, device=device).to(kind).transpose(2, 3),
                    torch.randn(batch, seq, 2 * kv, size, device=device).to(kind)[:, :, ::2],
                    torch.randn_like(parts[2]),
                ]
                back = torch.full_like(y, torch.nan)
                heads_triton.move(back, *grads, *rows, pairs, back=True)
                want = heads.join(*(x.cpu().double() for x in grads), *exact[1:], pairs)
                torch.testing.assert_close(back.cpu().double(), want, rtol=near, atol=near)
