# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportMissingParameterType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
"""The kernel of `mtl.kernels.cached`, in Triton: imported where there is a GPU to run it."""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, k, v, keys, values, slot, places, positions, cos, sin, parts, stats, turns, out,
    q_row, q_head, k_row, k_head, v_row, v_head, slots, heads, window, scale,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Attend with the GROUP queries of one key head to CHUNK slots; the last of a head's SPLITS programs joins their results.

    The new key and value take the place of what lies in their slot, and the program that holds it writes them there. TURN is 1
    where elements half a head apart are pairs to turn, 2 where neighbours are.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = pair // heads, pair % heads
    m, d, at = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.load(slot)
    inside, used = d < SIZE, (m < GROUP)[:, None] & (d < SIZE)[None, :]
    queries = tl.load(q + row * q_row + (head * GROUP + m)[:, None] * q_head + d[None, :], mask=used, other=0.0)
    new_key = tl.load(k + row * k_row + head * k_head + d, mask=inside, other=0.0)
    new_value = tl.load(v + row * v_row + head * v_head + d, mask=inside, other=0.0)
    if TURN > 0:
        first = (d < SIZE // 2) if TURN == 1 else (d % 2 == 0)
        partner = tl.where(first, d + SIZE // 2, d - SIZE // 2) if TURN == 1 else (d ^ 1)
        angle = row * (SIZE // 2) + ((d % (SIZE // 2)) if TURN == 1 else (d // 2))
        turned_by, side = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
        side = tl.where(first, -side, side)
        paired = tl.load(q + row * q_row + (head * GROUP + m)[:, None] * q_head + partner[None, :], mask=used, other=0.0)
        queries = (queries.to(tl.float32) * turned_by[None, :] + paired.to(tl.float32) * side[None, :]).to(queries.dtype)
        paired_key = tl.load(k + row * k_row + head * k_head + partner, mask=inside, other=0.0)
        new_key = (new_key.to(tl.float32) * turned_by + paired_key.to(tl.float32) * side).to(new_key.dtype)
    here = tl.load(positions + row)
    cache = (row.to(tl.int64) * slots * heads + head) * SIZE
    if (at >= part * CHUNK) & (at < part * CHUNK + CHUNK) & (at < slots):
        tl.store(keys + cache + at * heads * SIZE + d, new_key, mask=inside)
        tl.store(values + cache + at * heads * SIZE + d, new_value, mask=inside)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(part * CHUNK, min(part * CHUNK + CHUNK, slots), BLOCK):
        t = start + tl.arange(0, BLOCK)
        gap = here - tl.load(places + row * slots + t, mask=t < slots, other=1 << 62)
        seen = gap >= 0
        if WINDOW:
            seen = seen & (gap < window)
        where = cache + t[:, None].to(tl.int64) * heads * SIZE + d[None, :]
        known, fresh = seen[:, None] & inside[None, :], (t == at)[:, None]
        block = tl.where(fresh, new_key[None, :], tl.load(keys + where, mask=known, other=0.0))
        scores = tl.dot(queries, tl.trans(block), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        odds, keep = tl.exp(scores - safe[:, None]), tl.exp(most - safe)
        block = tl.where(fresh, new_value[None, :], tl.load(values + where, mask=known, other=0.0))
        mixed = mixed * keep[:, None] + tl.dot(odds.to(block.dtype), block, input_precision="ieee")
        total, most = total * keep + tl.sum(odds, 1), top
    result = out + (pair * GROUP + m)[:, None] * SIZE + d[None, :]
    if SPLITS == 1:
        tl.store(result, (mixed / total[:, None]).to(out.dtype.element_ty), mask=used)
    else:
        mine = pair * SPLITS + part
        tl.store(parts + (mine * ROWS + m)[:, None] * WIDE + d[None, :], mixed, mask=used)
        tl.store(stats + 2 * mine * ROWS + m, most)
        tl.store(stats + (2 * mine + 1) * ROWS + m, total)
        tl.debug_barrier()
        if tl.atomic_add(turns + pair, 1) % SPLITS == SPLITS - 1:
            tl.debug_barrier()
            most = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mixed = tl.zeros([ROWS, WIDE], tl.float32)
            for i in tl.range(0, SPLITS, loop_unroll_factor=8):  # so that many loads are under way at once
                other = pair * SPLITS + i
                theirs = tl.load(stats + 2 * other * ROWS + m, cache_modifier=".cg")
                top = tl.maximum(most, theirs)
                safe = tl.where(top == float("-inf"), 0.0, top)
                keep, add = tl.exp(most - safe), tl.exp(theirs - safe)
                more = tl.load(parts + (other * ROWS + m)[:, None] * WIDE + d[None, :], mask=used, other=0.0, cache_modifier=".cg")
                mixed = mixed * keep[:, None] + more * add[:, None]
                total = total * keep + tl.load(stats + (2 * other + 1) * ROWS + m, cache_modifier=".cg") * add
                most = top
            tl.store(result, (mixed / total[:, None]).to(out.dtype.element_ty), mask=used)
