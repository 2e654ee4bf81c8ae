"""The kernels beside copy engines, against torch's own operations: by Triton's interpreter in a process of its own, or on a GPU."""

import torch

from mtl.kernels import engine_triton


def check(device: str) -> None:
    """Sums of parts side by side, and casts into rows that lie apart, have the bits of plain additions and copies."""
    torch.manual_seed(0)
    for kind, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float32, torch.float64)):
        for size, rows, columns in ((4, 5, [1500, 7, 1024]), (2, 3, [64]), (8, 1, [33, 2049]), (4, 3, [2600]), (2, 3, [9, 1030, 3, 5, 7])):
            landed = torch.randn(size, rows, sum(columns), device=device).to(kind)
            want = landed[0].to(wide)
            for member in landed[1:]:
                want = want + member.to(wide)
            for me in (0, 1, size - 1):
                given, own = landed.clone(), landed[me].clone()
                given[me] = torch.nan  # nobody sends it, so whatever lies there is not read
                found = engine_triton.sums(given, own, me, columns, wide)
                same = (torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, want.split(columns, 1), strict=True))
                assert all(same), (kind, size, me)
                if len(columns) == 1:
                    found = engine_triton.sums_in_turn(given, own, me, wide)
                    assert torch.equal(torch.stack(found, -1).flatten(1), want[:, : columns[0] // 2 * 2]), (kind, size, me)
            if len(columns) == 1:
                a, b = (torch.randn(2600, rows, device=device).to(kind).t() for _ in range(2))
                turned, again = torch.full((2, rows, 5200), torch.nan, device=device, dtype=torch.float16)
                engine_triton.cast_in_turn(a, b, turned, again)
                assert torch.equal(turned, torch.stack([a, b], -1).flatten(1).half()) and torch.equal(turned, again)
    whole, other = torch.zeros(6, 3000, device=device, dtype=torch.float16), torch.zeros(6, 2500, device=device, dtype=torch.float16)
    x = torch.randn(6, 1100, device=device)
    engine_triton.cast(x.split([3, 1030, 20, 40, 7], 1), whole[:, 900:2000], other[:, 7:1107])
    engine_triton.cast([torch.randn(50, 6, device=device).t()], whole[:, :50], other[:, 2000:2050])
    assert torch.equal(whole[:, 900:2000], x.half()) and whole[:, 2000:].abs().sum() == 0 and whole[:, 50:900].abs().sum() == 0
    assert whole[:, :50].abs().min() > 0 and torch.equal(other[:, 7:1107], x.half()) and torch.equal(other[:, 2000:2050], whole[:, :50])
    assert other[:, :7].abs().sum() == other[:, 1107:2000].abs().sum() == other[:, 2050:].abs().sum() == 0
