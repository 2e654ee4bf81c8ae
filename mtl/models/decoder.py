"""The decoder family: GPT-2/3, Llama, Mistral and Falcon by configuration. Four pure functions: specs, embed, block, head."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl import random, tree
from mtl.axes import LETTERS
from mtl.errors import UserError, unknown
from mtl.kernels.results import Results
from mtl.models import token
from mtl.ops import alibi, gated
from mtl.ops.attention import attention
from mtl.ops.cache import cached_attention
from mtl.ops.cross_entropy import cross_entropy, next_token_logits
from mtl.ops.dropout import dropout
from mtl.ops.embedding import embedding
from mtl.ops.heads import turned_apart
from mtl.ops.linear import fetch, is_one, project, project_all, project_as_one, project_of
from mtl.ops.norm import layer_norm, rms_norm
from mtl.ops.remat import remat
from mtl.ops.rotary import RopeScaling, angles, document_lengths, rotate
from mtl.params import ParamSpec
from mtl.runtime.stored import gradient_stored, stored
from mtl.sharding.parallel import Parallel

Params = Mapping[str, Any]
Stream = dict[str, Tensor]
"""What travels beside the residual stream: rotary angles or positions, ends of documents, dropout's counters, a layer's cache."""

GATED = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": partial(F.gelu, approximate="tanh"), "reglu": F.relu}
PLAIN = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "relu2": lambda x: F.relu(x).square(), "silu": F.silu,
}  # fmt: skip
MLP_BYTES = 2**32
"""What is wider inside an MLP goes through it in pieces of the sequence, where the layer is computed again in backward."""
PROJECTIONS = {
    "query": ("D", "HK"), "key": ("D", "GK"), "value": ("D", "GK"), "out": ("HK", "D"),
    "up": ("D", "F"), "gate": ("D", "F"), "down": ("F", "D"),
}  # fmt: skip
"""What each projection of a layer contracts, and what it makes."""
DROPOUTS = ("dropout_embed", "dropout_attention", "dropout_mlp", "dropout_lora")


@dataclass(frozen=True)
class Config:
    """Sizes and switches of a decoder. ``kv_heads`` below ``heads`` is grouped-query attention, 1 is multi-query.

    ``window`` is how many tokens each one sees, itself included; layers numbered in ``full_layers`` see all. Scores are multiplied by
    ``attention_scale`` (None: head_size ** -0.5), with ``scale_by_layer`` divided by the layer's number from 1.
    """

    vocab: int
    layers: int
    embed: int
    heads: int
    kv_heads: int
    mlp: int
    head_size: int = 64
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    positions: Literal["rotary", "learned", "alibi", "none"] = "rotary"
    max_positions: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_pairs: Literal["half", "interleaved"] = "half"
    activation: Literal["swiglu", "geglu", "geglu_tanh", "reglu", "gelu", "gelu_tanh", "relu", "relu2", "silu"] = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    parallel: Literal["none", "one_norm", "two_norms"] = "none"
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    attention_scale: float | None = None
    scale_by_layer: bool = False
    qk_norm: bool = False
    dropout_embed: float = 0.0
    dropout_attention: float = 0.0
    dropout_mlp: float = 0.0
    dropout_lora: float = 0.0
    z_loss: float = 0.0
    init_std: float = 0.02
    attention_impl: str = "auto"
    loss_impl: Literal["auto", "plain", "fused"] = "auto"

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be a model."""
        for name in ("vocab", "layers", "embed", "heads", "kv_heads", "mlp", "head_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--model.{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1.")
        if self.heads % self.kv_heads:
            raise UserError(
                f"--model.heads {self.heads} does not divide by --model.kv-heads {self.kv_heads}: every key head serves equally many."
            )
        if self.positions == "learned" and self.max_positions < 1:
            raise UserError("--model.positions is learned, so --model.max-positions must say how many there are (at least 1).")
        if self.positions == "rotary" and self.head_size % 2:
            raise UserError(f"--model.head-size is {self.head_size}: rotary positions need an even head size.")
        if self.rope_scaling.kind == "dynamic" and self.head_size < 4:
            raise UserError(f"--model.head-size is {self.head_size}: dynamic rope scaling needs at least 4.")
        if self.full_layers and (self.window is None or not set(self.full_layers) <= set(range(self.layers))):
            raise UserError(f"--model.full-layers {self.full_layers} must be numbers of layers, from 0, of a model that has a window.")
        if self.window is not None and self.window < 1:
            raise UserError(f"--model.window is {self.window}: a sliding window sees at least 1 token, or None for all.")
        if self.activation not in GATED | PLAIN:
            raise unknown("--model.activation", self.activation, GATED | PLAIN)
        if not 0 < self.rope_theta < math.inf:
            raise UserError(f"--model.rope-theta is {self.rope_theta}: it must be a number above 0.")
        if self.attention_scale is not None and not math.isfinite(self.attention_scale):
            raise UserError(f"--model.attention-scale is {self.attention_scale}: it must be finite, or None for head_size ** -0.5.")
        for name in ("norm_eps", "z_loss", "init_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--model.{name.replace('_', '-')} is {getattr(self, name)}: it must be a number from 0 on.")
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--model.{name.replace('_', '-')} is {getattr(self, name)}: a dropout rate lies from 0 to under 1.")


def config_from(values: Mapping[str, Any]) -> Config:
    """Make a configuration again from what ``dataclasses.asdict`` and JSON made of it."""
    names = {f.name for f in fields(Config)}
    for name in values:
        if name not in names:
            raise unknown("setting of a saved model", name, names)
    known: dict[str, Any] = {**values, "full_layers": tuple(values.get("full_layers", ()))}
    if isinstance(known.get("rope_scaling"), dict):
        known["rope_scaling"] = RopeScaling(**known["rope_scaling"])
    return Config(**known)


def specs(cfg: Config) -> dict[str, Any]:
    """Declare every parameter. Weights of products start with the embed axis, which FSDP splits, so that gathers need no copies."""
    count, d, h, g, k, f = cfg.layers, cfg.embed, cfg.heads, cfg.kv_heads, cfg.head_size, cfg.mlp
    std, deep = cfg.init_std, cfg.init_std / (2 * cfg.layers) ** 0.5
    layers: dict[str, Any] = {
        "norm1": _norm_specs(cfg, count),
        "query": {"weight": ParamSpec((count, d, h, k), "LDHK", std)},
        "key": {"weight": ParamSpec((count, d, g, k), "LDGK", std)},
        "value": {"weight": ParamSpec((count, d, g, k), "LDGK", std)},
        "out": {"weight": ParamSpec((count, d, h, k), "LDHK", deep)},
        "up": {"weight": ParamSpec((count, d, f), "LDF", std)},
        "down": {"weight": ParamSpec((count, d, f), "LDF", deep)},
    }
    if cfg.parallel != "one_norm":
        layers["norm2"] = _norm_specs(cfg, count)
    if cfg.activation in GATED:
        layers["gate"] = {"weight": ParamSpec((count, d, f), "LDF", std)}
    if cfg.qk_norm:
        layers["query_norm"] = layers["key_norm"] = {"weight": ParamSpec((count, k), "LK", fill=1.0)}
    if cfg.qkv_bias:
        layers["query"]["bias"] = ParamSpec((count, h, k), "LHK")
        layers["key"]["bias"] = layers["value"]["bias"] = ParamSpec((count, g, k), "LGK")
    if cfg.out_bias:
        layers["out"]["bias"] = ParamSpec((count, d), "LW")
    if cfg.mlp_bias:
        layers["up"]["bias"], layers["down"]["bias"] = ParamSpec((count, f), "LF"), ParamSpec((count, d), "LW")
        if cfg.activation in GATED:
            layers["gate"]["bias"] = ParamSpec((count, f), "LF")
    tree: dict[str, Any] = {"embed": {"weight": ParamSpec((cfg.vocab, d), "VD", std)}, "layers": layers, "norm": _norm_specs(cfg)}
    if cfg.positions == "learned":
        tree["positions"] = {"weight": ParamSpec((cfg.max_positions, d), "PD", std)}
    if not cfg.tied:
        tree["head"] = {"weight": ParamSpec((d, cfg.vocab), "DV", std)}
    return tree


def sizes(cfg: Config) -> dict[str, int]:
    """Give the global size of every logical axis that the model has."""
    return {
        "layers": cfg.layers, "vocab": cfg.vocab, "embed": cfg.embed, "norm": cfg.embed, "mlp": cfg.mlp, "head": cfg.head_size,
        "heads": cfg.heads, "core_heads": cfg.heads, "kv_heads": cfg.kv_heads, "core_kv_heads": cfg.kv_heads,
        "positions": cfg.max_positions,
    }  # fmt: skip


def together(cfg: Config) -> list[dict[str, str]]:
    """Name the projections of a layer that share an input, and the axes of their weights: what decoding multiplies as one."""
    gated = [{"gate": "DF", "up": "DF"}] if cfg.activation in GATED else []
    return [{"query": "DHK", "key": "DGK", "value": "DGK"}, *gated]


def projections(cfg: Config) -> dict[str, str]:
    """Name the projections of a layer, and the axes of their weights there."""
    return {name: p["weight"].axes[1:] for name, p in specs(cfg)["layers"].items() if name in PROJECTIONS}


def cache_specs(cfg: Config, rows: int, slots: int) -> list[dict[str, ParamSpec]]:
    """Declare what generation keeps of every layer: a key and a value a slot, laid out as the layer makes them."""
    one = ParamSpec((rows, slots, cfg.kv_heads, attended_size(cfg)), "BTGK")
    return [{"cached_key": one, "cached_value": one} for _ in range(cfg.layers)]


def embed(cfg: Config, par: Parallel, params: Params, batch: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Stream]:
    """Turn tokens (B, S) into the residual stream (B, R, D) and what travels beside it.

    batch has tokens and positions (B, S), and where used documents (B, D), rows [B], slots (S) and key [].
    """
    x = embedding(par, batch["tokens"], params["embed"]["weight"], dtype)
    if cfg.positions == "learned":
        table = fetch(par, "PD", params["positions"]["weight"], dtype)
        x = x + par.reshard(F.embedding(batch["positions"], table), "BSD", "BRD")
    stream = beside(cfg, par, batch)
    return _drop(cfg.dropout_embed, par, x, stream, site=0), stream


def beside(cfg: Config, par: Parallel, batch: Mapping[str, Tensor]) -> Stream:
    """Give what travels beside the residual stream. It needs no parameters, so every stage of a pipeline makes its own."""
    stream: Stream = {}
    if cfg.positions == "rotary":
        lengths = document_lengths(par, batch) if cfg.rope_scaling.kind == "dynamic" else None
        stream["cos"], stream["sin"] = angles(batch["positions"], cfg.head_size, cfg.rope_theta, cfg.rope_scaling, lengths)
    if cfg.positions == "alibi":
        stream["positions"] = batch["positions"]
    if "documents" in batch:
        stream["documents"] = batch["documents"]
    if any(getattr(cfg, name) for name in DROPOUTS):
        stream |= {"rows": batch["rows"], "slots": par.reshard(batch["slots"], "S", "R"), "key": batch["key"]}
    if cfg.dropout_lora:
        stream["inner_slots"] = batch["slots"]
    return stream


def at_layer(cfg: Config, layer: int) -> Config:
    """Give the configuration that `block` takes for one layer: what differs between layers is settled."""
    window = None if layer in cfg.full_layers else cfg.window
    scale = cfg.attention_scale
    if cfg.scale_by_layer:
        scale = (cfg.head_size**-0.5 if scale is None else scale) / (layer + 1)
    return replace(cfg, window=window, full_layers=(), attention_scale=scale, scale_by_layer=False)


def attended_size(cfg: Config) -> int:
    """Give the size of the heads that attention sees: ALiBi adds channels."""
    return alibi.attended_size(cfg.head_size, cfg.heads, cfg.kv_heads) if cfg.positions == "alibi" else cfg.head_size


def block(cfg: Config, par: Parallel, p: Params, x: Tensor, stream: Stream, again: str = "none", results: Results | None = None) -> Tensor:
    """Apply one layer to the residual stream (B, R, D). Backward computes ``again`` none of it, the mlp, or what is selective.

    That is the attention core and the MLP's inside. ``results`` notes what attention makes, or has it from a first run.
    """
    if "cached_slot" in stream and token.fits(cfg, par, p, x):
        return token.block(cfg, par, p, x, partial(_attend, cfg, par, p, stream))
    inside = partial(remat, late=par.late) if again == "selective" else _as_is
    mlp = _mlp_again if again == "mlp" else _mlp_branch
    h = _norm(cfg, p["norm1"], x)
    if cfg.parallel == "one_norm":  # what two products share is gathered once, and kept
        h = par.reshard(h, "BRD", "BSD")
    attended = _drop(cfg.dropout_attention, par, _attention(cfg, par, p, h, stream, inside, results), stream, site=1)
    if cfg.parallel == "none":
        x = stored(x + attended, gradient=True)
        return stored(x + mlp(cfg, par, p, x, stream, inside), gradient=True)
    return stored(x + attended + mlp(cfg, par, p, h if cfg.parallel == "one_norm" else x, stream, inside), gradient=True)


def head(cfg: Config, par: Parallel, params: Params, x: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give this device's share of (loss, cross-entropy), both summed over the target tokens with their weights."""
    x = par.reshard(_norm(cfg, params["norm"], x), "BRD", "BSD")
    letters, weight = _head_weight(cfg, params)
    return cross_entropy(par, letters, x, weight, batch["targets"], batch["weights"], cfg.z_loss, cfg.loss_impl)


def logits(cfg: Config, par: Parallel, params: Params, x: Tensor) -> Tensor:
    """Give the logits (B, S, vocab), the vocabulary whole."""
    x = par.reshard(_norm(cfg, params["norm"], x), "BRD", "BSD")
    letters, weight = _head_weight(cfg, params)
    return next_token_logits(par, letters, x, weight)


def for_evaluation(cfg: Config) -> Config:
    """Give the same model without dropout."""
    return replace(cfg, **dict.fromkeys(DROPOUTS, 0.0))


def layer_key(key: Tensor, layer: int) -> Tensor:
    """Give one layer's key for dropout."""
    return random.bits(random.key("layer", layer), key)


def _head_weight(cfg: Config, params: Params) -> tuple[str, Tensor]:
    return ("VD", params["embed"]["weight"]) if cfg.tied else ("DV", params["head"]["weight"])


def _as_is(fn: Any) -> Any:
    return fn


def _norm_specs(cfg: Config, layers: int | None = None) -> dict[str, ParamSpec]:
    shape, axes = ((cfg.embed,), "W") if layers is None else ((layers, cfg.embed), "LW")
    weight = {"weight": ParamSpec(shape, axes, fill=1.0)}
    return weight | {"bias": ParamSpec(shape, axes)} if cfg.norm_bias else weight


def _norm(cfg: Config, p: Params, x: Tensor) -> Tensor:
    if cfg.norm == "rms":
        y = rms_norm(x, p["weight"], cfg.norm_eps)
        return y + p["bias"].to(y.dtype) if cfg.norm_bias else y
    return layer_norm(x, p["weight"], p.get("bias"), cfg.norm_eps)


def _attention(cfg: Config, par: Parallel, p: Params, h: Tensor, stream: Stream, again: Any, results: Results | None) -> Tensor:
    drops, left = _drops(cfg, par, stream), _input(cfg)
    spellings = {"query": f"{left},DHK->BSHK", "key": f"{left},DGK->BSGK", "value": f"{left},DGK->BSGK"}
    norms = {name: p[name] for name in ("query_norm", "key_norm") if cfg.qk_norm}
    fused = "cos" in stream and "cached_key" not in stream and not norms and is_one(par, h, p, spellings)
    qkv, sizes = project_as_one(par, h, p, spellings) if fused else (None, [])

    def attend(norms: Params, stream: Stream, *qkv: Tensor) -> Tensor:
        if fused:
            qkv = turned_apart(qkv[0], stream["cos"], stream["sin"], sizes[1][0], cfg.rope_pairs)
        return _attend(cfg, par, norms, stream, *qkv, results=results, turned=fused)

    y = again(attend)(norms, stream, *(project_all(par, h, p, spellings, drops) if qkv is None else [qkv]))
    return project(par, "BSHK,DHK->BRD", y, p["out"], drops.get("out"))


def _attend(
    cfg: Config, par: Parallel, p: Params, stream: Stream, q: Tensor, k: Tensor, v: Tensor, results: Any = None, turned: bool = False
) -> Tensor:
    """Take query, key and value, perhaps ``turned`` already, to what attention makes of them (B, S, H, K); norms of two are in ``p``."""
    scale = cfg.head_size**-0.5 if cfg.attention_scale is None else cfg.attention_scale
    if cfg.qk_norm:
        q, k = (rms_norm(x, p[name]["weight"], cfg.norm_eps) for x, name in ((q, "query_norm"), (k, "key_norm")))
    rotary = cfg.positions == "rotary"
    if rotary and not turned and "cached_key" not in stream:
        q, k = (rotate(x, stream["cos"], stream["sin"], cfg.rope_pairs) for x in (q, k))
    if cfg.positions == "alibi":
        q, k, v = alibi.extend(par, q, k, v, stream["positions"])
    if "cached_key" in stream:
        pairs = cfg.rope_pairs if rotary else None
        return cached_attention(par, q, k, v, stream, cfg.window, cfg.attention_impl, scale, pairs)[..., : cfg.head_size]
    if not turned and (cfg.positions in ("rotary", "alibi") or cfg.qk_norm or cfg.qkv_bias):  # else attention can read parts of a product
        q, k, v = (stored(x) for x in (q, k, v))  # once, not for forward and for backward; and the product can go
    return attention(par, q, k, v, cfg.window, stream.get("documents"), cfg.attention_impl, scale, results)[..., : cfg.head_size]


def _mlp_again(cfg: Config, par: Parallel, p: Params, x: Tensor, stream: Stream, _: Any) -> Tensor:
    """Do as ``_mlp_branch``, but keep its input alone."""
    mine = {name: p[name] for name in ("norm2", "gate", "up", "down") if name in p}
    return remat(lambda p, x, stream: _mlp_branch(cfg, par.keeping(), p, x, stream, _as_is), par.late, waits=1)(mine, x, stream)


def _mlp_branch(cfg: Config, par: Parallel, p: Params, x: Tensor, stream: Stream, again: Any) -> Tensor:
    """Give what the MLP adds, from the residual stream, or from what attention's norm made of it."""
    h = x if cfg.parallel == "one_norm" else _norm(cfg, p["norm2"], x)
    return _drop(cfg.dropout_mlp, par, _mlp(cfg, par, p, h, stream, again), stream, site=2)


def _mlp(cfg: Config, par: Parallel, p: Params, h: Tensor, stream: Stream, again: Any) -> Tensor:
    names = ("gate", "up") if cfg.activation in GATED else ("up",)
    pieces = 1 if cfg.dropout_lora else _pieces(par, h, len(names) * cfg.mlp)
    if pieces > 1:
        run = remat(lambda p, h: _whole_mlp(cfg, par, p, h, {}, again), par.late)
        mine = tree.map(gradient_stored, {name: p[name] for name in (*names, "down")})  # else all pieces' parts of it would live on
        return torch.cat([run(mine, part) for part in h.tensor_split(pieces, 1)], 1)
    return _whole_mlp(cfg, par, p, h, stream, again)


def _pieces(par: Parallel, h: Tensor, wide: int) -> int:
    """Count the pieces of the sequence that a layer computed again in backward takes through its MLP one by one.

    Its forward there is not needed again, so that a compiled step computes nothing more often for it.
    """
    if par.regather or par.axes("R") != par.axes("S"):
        return 1
    columns = wide // par.mesh.size(par.axes("F"))
    return min(h.shape[1], -(-h.shape[0] * h.shape[1] * columns * h.dtype.itemsize // MLP_BYTES))


def _whole_mlp(cfg: Config, par: Parallel, p: Params, h: Tensor, stream: Stream, again: Any) -> Tensor:
    drops = _drops(cfg, par, stream)
    names = ("gate", "up") if cfg.activation in GATED else ("up",)
    if again is _as_is and not drops and gated.fits(par, cfg.activation, h, p):
        return gated.mlp(par, cfg.activation, h, p)
    inner = project_all(par, h, p, dict.fromkeys(names, f"{_input(cfg)},DF->BSF"), drops)

    def activation(*inner: Tensor) -> Tensor:
        return GATED[cfg.activation](inner[0]) * inner[1] if cfg.activation in GATED else PLAIN[cfg.activation](inner[0])

    def down(p: Params, stream: Stream, *inner: Tensor) -> Tensor:
        return project(par.keeping(), "BSF,DF->BRD", activation(*inner), p, _drops(cfg, par, stream).get("down"))

    if again is not _as_is:
        return again(down)(p["down"], {name: stream[name] for name in ("rows", "inner_slots", "key") if drops}, *inner)
    return project_of(par, "BSF,DF->BRD", activation, inner, p["down"], drops.get("down"))


def _input(cfg: Config) -> str:
    """Spell what a layer's first projections take in."""
    return "BSD" if cfg.parallel == "one_norm" else "BRD"


def _drop(rate: float, par: Parallel, x: Tensor, stream: Stream, site: int) -> Tensor:
    if rate == 0.0:
        return x
    key = stream["key"] + random.key("dropout", site)
    return dropout(x, rate, key, stream["rows"], stream["slots"], par.sizes["seq"])


def _drops(cfg: Config, par: Parallel, stream: Stream) -> dict[str, Any]:
    """Give what drops the inputs of each projection's adapter, each its own."""
    if cfg.dropout_lora == 0.0:
        return {}

    def one(name: str, x: Tensor) -> Tensor:
        parts = [(par.span(c)[0], par.sizes[LETTERS[c]]) for c in PROJECTIONS[name][0]]
        key = stream["key"] + random.key("adapter", name)
        slots = stream["slots" if PROJECTIONS[name][0] == "D" and _input(cfg) == "BRD" else "inner_slots"]
        return dropout(x, cfg.dropout_lora, key, stream["rows"], slots, par.sizes["seq"], parts)

    return {name: partial(one, name) for name in PROJECTIONS}
