"""Generation on any mesh: the prompts fill the cache, then one compiled step a token, which GPUs replay."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl import tree
from mtl.data.batches import to_device
from mtl.errors import UserError
from mtl.generate.memory import Room, allocate, parallels, room
from mtl.generate.sampling import Sampling, choose
from mtl.generate.weights import ready
from mtl.ops.cache import NOWHERE, put
from mtl.pipeline.exchange import stage_parallel
from mtl.precision import Precision
from mtl.runtime.compile import compiled, inductor_options
from mtl.runtime.replay import replayed
from mtl.sharding.collectives import psum
from mtl.sharding.mesh import Mesh
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules

State = dict[str, Any]
Pick = Callable[[Tensor, State], Tensor]
"""Chooses this device's next tokens [B] from logits [B, V] and the state."""
PIECE = 4
"""Layers in a compiled graph: more would save little more, and take as much longer to compile."""
Tokens = list[int | None]
"""The next token of every prompt, or None where the prompt's text has ended."""


@torch.no_grad()
def generate(
    model: Any,
    config: Any,
    mesh: Mesh,
    rules: Rules,
    precision: Precision,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    ends: Sequence[int] = (),
    backend: Any = None,
) -> Iterator[Tokens]:
    """Continue prompts token by token: yields the next tokens of all of them, at most ``max_tokens`` times.

    Every device of the mesh takes part and gets the same tokens. ``params`` are DTensors at rest; a row is over after one of the tokens
    ``ends``, which it still gives. With a ``backend`` the step is compiled, and GPUs replay it as one recorded launch.
    """
    check(model, config, prompts, max_tokens)
    config = model.for_evaluation(config)
    space = room(rules, mesh.shape, len(prompts), max(len(p) for p in prompts), max(max_tokens - 1, 0))
    wide, narrow = parallels(model, config, mesh, rules, space, precision)
    weights = ready(model, config, wide, precision, params)
    state = start(model, config, wide, narrow, precision, prompts, space)
    how = sampling or Sampling()

    def pick(logits: Tensor, state: State) -> Tensor:
        return choose(logits, how, state["rows"], state["count"])

    first = make_prefill(model, config, wide, narrow, precision, pick)
    one = make_step(model, config, narrow, precision, pick, space, backend)
    step = partial(one, weights, state) if backend is None else replayed(partial(one, weights, state), mesh.device_type)
    coming = _Coming(first(weights, state, prompt_batch(wide, prompts, space))) if max_tokens else None
    over = [False] * len(prompts)
    for i in range(max_tokens):
        assert coming is not None
        now, coming = coming, _Coming(step()) if i + 1 < max_tokens else None  # runs while this token is read
        tokens = now.read()[: len(prompts)]
        yield [None if done else token for done, token in zip(over, tokens, strict=True)]
        over = [done or token in ends for done, token in zip(over, tokens, strict=True)]
        if all(over):
            return


def check(model: Any, config: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Refuse what cannot be continued, before anything is computed."""
    if max_tokens < 0:
        raise UserError(f"max-tokens is {max_tokens}: expected how many tokens to write at most, 0 or more.")
    if not prompts:
        raise UserError("there is no prompt to continue.")
    sizes = model.sizes(config)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} has no tokens: a model continues at least one.")
        bad = [t for t in prompt if not 0 <= t < sizes["vocab"]]
        if bad:
            raise UserError(f"prompt {i} holds token {bad[0]}, but the model's vocabulary has {sizes['vocab']} (from 0 on).")
        if sizes.get("positions") and config.positions == "learned" and len(prompt) + max_tokens > sizes["positions"]:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens and max-tokens is {max_tokens}, but the model has learned {sizes['positions']} "
                f"positions. Ask for at most {max(sizes['positions'] - len(prompt), 0)} tokens, or shorten the prompt."
            )


def start(
    model: Any, config: Any, wide: Parallel, narrow: Parallel, precision: Precision, prompts: Sequence[Sequence[int]], space: Room
) -> State:
    """Make what a step changes in place: the cache and its places, this device's last tokens, their positions, and their count."""
    rows = _own_rows(wide, space)
    device = wide.mesh.device_type
    first, count = narrow.span("L", "store")
    own = model.cache_specs(config, space.rows, space.slots)[first : first + count]
    layers = allocate(own, narrow, precision.compute)
    slots = space.slots // wide.mesh.size(wide.axes("S"))
    lengths = torch.tensor([len(_prompt(prompts, r)) for r in rows], device=device)
    return {
        "layers": layers,
        "cached_place": torch.full((len(rows), slots), NOWHERE, dtype=torch.int64, device=device),
        "cached_turns": torch.zeros(len(rows) * narrow.span("G")[1], dtype=torch.int32, device=device),
        "tokens": torch.zeros(len(rows), 1, dtype=torch.int64, device=device),
        "positions": lengths.unsqueeze(1),
        "rows": torch.tensor(rows, device=device),
        "count": torch.zeros((), dtype=torch.int64, device=device),
    }


def make_prefill(
    model: Any, config: Any, wide: Parallel, narrow: Parallel, precision: Precision, pick: Pick
) -> Callable[[Any, State, dict[str, Tensor]], Tensor]:
    """Make ``prefill(params, state, batch)``: run the prompts, fill the cache, and give the first new token of every row."""
    fold = make_fold(model, config, wide)

    def prefill(params: Any, state: State, batch: dict[str, Tensor]) -> Tensor:
        x, stream = model.embed(config, wide, params, batch, precision.compute)
        x = fold(params, x, stream, state["layers"])
        place = batch["slots"].expand(batch["tokens"].shape)
        state["cached_place"][:, : place.shape[1]].copy_(place.masked_fill(place >= state["positions"], NOWHERE))
        x = wide.reshard(x, "BRD", "BSD")
        last = torch.where((place == state["positions"] - 1).unsqueeze(-1), x, 0.0).sum(1, keepdim=True)
        return _next(model, config, narrow, params, psum(last, wide.axes("S"), wide.mesh), state, pick)

    return prefill


def make_step(
    model: Any, config: Any, par: Parallel, precision: Precision, pick: Pick, space: Room, backend: Any = None
) -> Callable[[Any, State], Tensor]:
    """Make ``step(params, state)``: take every row's last token in, and give all rows' next ones. The state is written in place.

    With a ``backend`` what comes before the layers, each kind of piece of them once, and what comes after them are compiled.
    """
    split = par.axes("T")
    index, share = par.mesh.index(split), max(space.decode // par.mesh.size(split), 1)
    before = space.prompt // par.mesh.size(split)

    def begin(params: Any, state: State) -> tuple[Tensor, Any, Tensor]:
        count = state["count"] - 1  # the first new token came from the prompt
        slot = torch.where(count // share == index, before + count % share, -1).unsqueeze(0)
        put(state["cached_place"], state["positions"], slot)
        x, stream = model.embed(config, par, params, {name: state[name] for name in ("tokens", "positions")}, precision.compute)
        return x, stream, slot

    def end(params: Any, state: State, x: Tensor) -> Tensor:
        state["positions"].add_(1)
        return _next(model, config, par, params, x, state, pick)

    make = _compiler(par, backend)
    enter, fold, leave = make(begin), make_fold(model, config, par, make), make(end)

    def step(params: Any, state: State) -> Tensor:
        around = {name: p for name, p in params.items() if name != "layers"}
        own = {name: x for name, x in state.items() if name != "layers"}
        x, stream, slot = enter(around, own)
        places = {"cached_slot": slot, "positions": state["positions"], **{name: state[name] for name in ("cached_place", "cached_turns")}}
        return leave(around, own, fold(params, x, stream | places, state["layers"]))

    return step


def make_fold(
    model: Any, config: Any, par: Parallel, make: Callable[[Any], Any] = lambda fn: fn
) -> Callable[[Any, Tensor, Any, Any], Tensor]:
    """Make ``fold(params, x, stream, cache)``, which runs the layers: each device of a pipeline its own, in turn; then all have the result.

    ``make`` compiles a kind of piece, `PIECE` layers at most: what ends one layer and begins the next is one kernel then.
    """
    (first, most), pipe, inner = par.span("L", "store"), par.mesh.shape.pipe, stage_parallel(par)
    count = min(most, max(par.sizes["layers"] - first, 0))  # the last devices have fewer where they do not divide
    layers = [model.at_layer(config, i) for i in range(first, first + count)]
    length = max(n for n in range(1, PIECE + 1) if count % n == 0)
    pieces = [tuple(layers[i : i + length]) for i in range(0, count, length)]

    def runner(piece: Any) -> Any:
        def blocks(ps: Any, x: Tensor, stream: Any, held: Any) -> Tensor:
            for layer, p, own in zip(piece, ps, held, strict=True):
                x = model.block(layer, inner, p, x, stream | own)
            return x

        return make(blocks)

    runners = {piece: runner(piece) for piece in dict.fromkeys(pieces)}

    def fold(params: Any, x: Tensor, stream: Any, cache: Any) -> Tensor:
        leaves, structure = tree.flatten(params["layers"])
        each = [tree.unflatten(structure, own) for own in zip(*(leaf.unbind(0) for leaf in leaves), strict=True)]
        for turn in range(pipe):
            if turn == par.mesh.index(("pipe",)):
                for i, piece in enumerate(pieces):
                    part = slice(i * length, (i + 1) * length)
                    x = runners[piece](each[part], x, stream, cache[part])
            elif pipe > 1:
                x = torch.zeros_like(x)
            x = psum(x, ("pipe",), par.mesh)
        return x

    return fold


def _compiler(par: Parallel, backend: Any) -> Callable[[Any], Any]:
    if backend is None:
        return lambda fn: fn
    options = inductor_options(backend, par.mesh.device_type, False)
    return lambda fn: compiled(fn, backend, options=options)


def _next(model: Any, config: Any, par: Parallel, params: Any, x: Tensor, state: State, pick: Pick) -> Tensor:
    """Choose this device's next tokens, put them into the state, and give those of all rows."""
    logits = model.logits(config, par, params, x)[:, 0]
    tokens = pick(logits, state)
    state["tokens"].copy_(tokens.unsqueeze(1))
    state["count"].add_(1)
    return par.reshard(tokens, "B", "_")


class _Coming:
    """Tokens on their way to the host: the copy starts at once, and what the device does later does not hold it up."""

    def __init__(self, tokens: Tensor) -> None:
        self.host = tokens.to("cpu", non_blocking=True)
        self.arrived = None if tokens.device.type in ("cpu", "mps") else torch.Event(device=tokens.device)
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> list[int]:
        """Wait for the copy alone."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


def _own_rows(par: Parallel, space: Room) -> list[int]:
    first, count = par.span("B")
    return list(range(first, first + count))


def _prompt(prompts: Sequence[Sequence[int]], row: int) -> Sequence[int]:
    """Give a row's prompt; rows that only fill the mesh repeat the first."""
    return prompts[row] if row < len(prompts) else prompts[0]


def prompt_batch(par: Parallel, prompts: Sequence[Sequence[int]], space: Room) -> dict[str, Tensor]:
    """Make this device's part of the prompts, filled up to one length at their ends."""
    rows = np.array(_own_rows(par, space))
    tokens = np.zeros((len(rows), space.prompt), dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(_prompt(prompts, row))] = _prompt(prompts, row)
    last = np.array([[len(_prompt(prompts, row)) - 1] for row in rows])
    positions = np.minimum(np.broadcast_to(np.arange(space.prompt), tokens.shape), last)  # no padding past a learned table's end
    return to_device(par, tokens, tokens, rows, torch.float32, {"positions": positions})
