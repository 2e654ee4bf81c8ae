"""A plan in words: the table that a terminal shows and the page that a browser does."""

import html
from collections.abc import Mapping

from mtl.inspect.page import page, size
from mtl.inspect.plan import Plan

COLOURS = {
    "weights": "#4c78a8", "optimizer": "#72b7b2", "gathered weights": "#9ecae9", "gradients": "#e45756", "activations": "#f2a541",
    "logits and loss": "#b279a2", "batch": "#bab0ac", "transfer slots": "#59a14f", "workspace": "#8d8d8d",
    "products": "#4c78a8", "attention": "#f2a541", "other kernels": "#72b7b2", "communication shown": "#e45756",
    "communication hidden": "#f3b5b4", "bubble": "#bab0ac",
}  # fmt: skip
PHASES = ("products", "attention", "other kernels", "communication shown", "bubble")


def as_text(plan: Plan, title: str) -> str:
    """Draw a plan in plain text."""
    lines = [title, "", *memory_lines(plan), *pipeline_lines(plan), "", *work_lines(plan)]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def summary(plan: Plan) -> str:
    """Say the most important in one line."""
    text = f"plan: peak {plan.memory.peak / 2**30:.2f} GiB a device"
    if plan.capacity is not None:
        text += f" of {plan.capacity / 2**30:.0f}"
    if plan.step is not None and plan.tokens_per_second is not None:
        text += f", {seconds(plan.step)} a step, {plan.tokens_per_second:,.0f} tokens/s/device"
    text += "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
    return text + ("" if plan.bound is None else f", bound by {plan.bound[0]} ({plan.bound[1]:.0%} of the step)")


def shortfall(plan: Plan) -> str:
    """Say what lacks where a plan does not fit; nothing where it does."""
    if plan.capacity is None or plan.fits:
        return ""
    lack = size(plan.memory.peak - plan.capacity)
    most = max(plan.memory.parts, key=lambda part: plan.memory.parts[part])
    return (
        f"the plan lacks {lack} of memory; most goes to {most} ({size(plan.memory.parts[most])}). "
        "A smaller micro-batch, more remat or more devices would need less."
    )


def against(what: str, found: Mapping[str, float | None]) -> str:
    """Put a plan beside what was measured; ``found`` has planned, measured and error of memory (GiB) and step time (seconds)."""
    said: list[str] = []
    for name, label, spell in (("peak_memory", what, lambda x: f"{x:.2f} GiB"), ("step_time", "step", seconds)):
        unit = "_gib" if name == "peak_memory" else ""
        planned, measured, error = found[f"{name}{unit}"], found[f"measured_{name}{unit}"], found[f"{name}_error"]
        text = f"{label} " + ("not planned" if planned is None else f"{spell(planned)} planned")
        text += ", not measured" if measured is None else f", {spell(measured)} measured"
        said.append(text + ("" if error is None else f" ({error:+.1%})"))
    return "plan against measured: " + "; ".join(said)


def memory_lines(plan: Plan) -> list[str]:
    """Draw the memory at the peak, a bar for every part."""
    peak = max(plan.memory.peak, 1)
    lines = ["memory of one device at its peak"]
    for part, count in plan.memory.parts.items():
        lines.append(f"  {part:18}{size(count):>12}  {'#' * round(40 * count / peak)}")
    room = "" if plan.capacity is None else f" of {size(plan.capacity)}" + ("" if plan.fits else ": DOES NOT FIT")
    host = [f"  {'in host memory':18}{size(plan.memory.host):>12}"] if plan.memory.host else []
    return [*lines, f"  {'peak':18}{size(plan.memory.peak):>12}{room}, at: {plan.memory.when}", *host]


def pipeline_lines(plan: Plan) -> list[str]:
    """Draw a pipeline's devices, each with its peak."""
    piped = plan.piped
    if piped is None:
        return []
    waits = "" if piped.bubble is None else f", {piped.bubble:.1%} of all devices' time is bubble"
    lines = ["", f"pipeline: {piped.schedule}, {piped.microbatches} micro-batches{waits}"]
    lines += [f"  {'device':>6}  {'stages':12}{'layers':>7}{'stored':>8}{'activations':>14}{'peak':>12}  at"]
    for at in piped.positions:
        stages, kept = " ".join(map(str, at.stages)), size(at.memory.parts["activations"])
        lines.append(f"  {at.device:>6}  {stages:12}{at.layers:>7}{at.stored:>8}{kept:>14}{size(at.memory.peak):>12}  {at.memory.when}")
    return lines


def work_lines(plan: Plan) -> list[str]:
    """Draw what a step computes, sends and takes."""
    lines = [
        "work of one device in a step",
        f"  {'products':18}{plan.matmul_flops:>22,} FLOP in {plan.matmuls:,}",
        f"  {'attention':18}{plan.attention_flops:>22,} FLOP",
    ]
    if plan.traffic:
        lines += ["", "communication of one device in a step", f"  {'':9}{'':15}{'over':18}{'times':>8}{'bytes':>20}{'sent':>20}  link"]
    for t in plan.traffic:
        name = "+".join(t.axes)
        lines.append(f"  {t.phase:9}{t.collective:15}{name:18}{t.times:>8,}{t.bytes:>20,}{t.sent:>20,}  {t.link}")
    if plan.seconds is None:
        return [*lines, "", "time: unknown (no table for this device; experiments/bench/calibrate.py measures one)"]
    lines += ["", "time of a step (estimated)"]
    for name, value in plan.seconds.items():
        if name != "step":
            lines.append(f"  {name:22}{seconds(value):>12}")
    assert plan.step is not None
    speed = f", {plan.tokens_per_second:,.0f} tokens/s/device, {(plan.tokens_per_second or 0) * plan.devices:,.0f} in all"
    mfu = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
    return [*lines, f"  {'step':22}{seconds(plan.step):>12}{speed}{mfu}"]


def seconds(value: float) -> str:
    """Spell a time."""
    return f"{value:,.2f} s" if value >= 10 else f"{value * 1e3:,.1f} ms"


def as_page(plan: Plan, title: str, about: str) -> str:
    """Make a plan's page: memory as a bar, the step as a timeline, and every number in tables."""
    peak = plan.memory.peak
    room = "" if plan.capacity is None else f" of {size(plan.capacity)}"
    fits = "" if plan.fits is not False else " <b>Does not fit.</b>"
    tiles = [f'<span><b id=peak data-bytes="{peak}">{size(peak)}</b> peak memory{room}</span>']
    if plan.step is not None and plan.tokens_per_second is not None:
        tiles += [
            f'<span><b id=step data-seconds="{plan.step}">{seconds(plan.step)}</b> a step</span>',
            f'<span><b id=speed data-value="{plan.tokens_per_second}">{plan.tokens_per_second:,.0f}</b> tokens/s/device</span>',
        ]
    if plan.mfu is not None:
        tiles.append(f'<span><b id=mfu data-value="{plan.mfu}">{plan.mfu:.1%}</b> MFU</span>')
    body = [f"<p>{html.escape(about)}{fits}</p>", f'<p class="tiles">{"".join(tiles)}</p>']
    body += ["<h2>Memory of one device at its peak</h2>", _bar(plan.memory.parts, max(peak, plan.capacity or 0), "bytes")]
    body += [f"<p class=note>The peak is at: {html.escape(plan.memory.when)}.</p>"]
    if plan.seconds is not None:
        shown = {name: plan.seconds[name] for name in PHASES}
        body += ["<h2>Time of a step (estimated)</h2>", _bar(shown, plan.seconds["step"], "seconds")]
        hidden = plan.seconds["communication hidden"]
        if hidden:
            body.append(f"<p class=note>Communication beside compute: {seconds(hidden)}.</p>")
    rows = [("products", f"{plan.matmul_flops:,} FLOP in {plan.matmuls:,}"), ("attention", f"{plan.attention_flops:,} FLOP")]
    body += ["<h2>Work of one device in a step</h2>", "<table>", *(f"<tr><td>{a}</td><td class=number>{b}</td></tr>" for a, b in rows)]
    body += ["</table>", *_pipeline(plan), "<h2>Communication of one device in a step</h2>", _traffic(plan)]
    body += [f"<p class=note>{html.escape(note)}</p>" for note in plan.notes]
    return page(title, "\n".join(body), "plan.js", plan.as_json())


def _pipeline(plan: Plan) -> list[str]:
    piped = plan.piped
    if piped is None:
        return []
    head = (
        "".join(f"<th class=number>{name}</th>" for name in ("device", "stages", "layers", "stored", "activations", "peak")) + "<th>at</th>"
    )
    rows = "".join(
        f"<tr><td class=number>{at.device}</td><td class=number>{' '.join(map(str, at.stages))}</td><td class=number>{at.layers}</td>"
        f"<td class=number>{at.stored}</td><td class=number>{size(at.memory.parts['activations'])}</td>"
        f'<td class=number data-bytes="{at.memory.peak}">{size(at.memory.peak)}</td><td>{html.escape(at.memory.when)}</td></tr>'
        for at in piped.positions
    )
    waits = "" if piped.bubble is None else f" {piped.bubble:.1%} of all devices' time is bubble."
    about = f"<p>{html.escape(piped.schedule)}, {piped.microbatches} micro-batches.{waits}"
    about += " What is above is of the fullest (memory) and the busiest (work) device.</p>"
    table = f'<div class="wide"><table id=pipeline><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return ["<h2>Devices of the pipeline</h2>", about, table]


def _bar(parts: Mapping[str, float], whole: float, unit: str) -> str:
    pieces, key = [], []
    for name, value in parts.items():
        said = size(value) if unit == "bytes" else seconds(value)
        pieces.append(f'<i style="width:{100 * value / max(whole, 1e-12):.3f}%;background:{COLOURS[name]}" title="{name}: {said}"></i>')
        key.append(f'<span data-part="{name}" data-{unit}="{value}"><i style="background:{COLOURS[name]}"></i>{name} {said}</span>')
    return f'<div class="bar">{"".join(pieces)}</div><div class="key">{"".join(key)}</div>'


def _traffic(plan: Plan) -> str:
    if not plan.traffic:
        return "<p>None.</p>"
    head = "".join(f"<th>{name}</th>" for name in ("phase", "collective", "over"))
    head += "".join(f"<th class=number>{name}</th>" for name in ("times", "bytes", "sent")) + "<th>link</th>"
    rows = "".join(
        f"<tr><td>{t.phase}</td><td>{t.collective}</td><td>{' + '.join(t.axes)}</td><td class=number>{t.times:,}</td>"
        f'<td class=number data-bytes="{t.bytes}">{size(t.bytes)}</td><td class=number>{size(t.sent)}</td><td>{t.link}</td></tr>'
        for t in plan.traffic
    )
    return f'<div class="wide"><table id=traffic><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
