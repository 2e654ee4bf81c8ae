"""The settings of a run, as frozen dataclasses that tyro reads from the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.data_settings import BatchFlags
from mtl.lora.adapters import Lora
from mtl.models import decoder
from mtl.sharding.mesh import MeshShape


@dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis. With none given, all devices go to one axis; one of them may be -1 (the rest)."""

    pipe: int | None = None
    replica: int | None = None
    fsdp: int | None = None
    expert: int | None = None
    context: int | None = None
    tensor: int | None = None

    def shape(self, world: int, default_axis: str) -> MeshShape:
        """Give the mesh for ``world`` devices."""
        given = {name: size for name, size in vars(self).items() if size is not None}
        return MeshShape(**(given or {default_axis: world})).fill(world)


@dataclass(frozen=True)
class TrainSettings:
    """Length and shape of a run."""

    steps: int = 100
    """Optimizer steps."""
    global_batch_size: int = 8
    """Samples a step, over all devices."""
    micro_batch_size: int | None = None
    """Samples a device takes through the model at once; by default as many as divide its share, up to 8."""
    seq_len: int = 1024
    """Tokens a sample."""
    seed: int = 0
    """Decides initial values, order of the data and dropout."""
    eval_every: int = 0
    """Steps between evaluations on held-out data; 0 evaluates at the end alone."""
    eval_samples: int = 64
    """Held-out samples an evaluation reads."""


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and learning rate."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    """The schedule ends at this share of lr."""
    weight_decay: float = 0.1
    """Decay of matrices; biases and norms have none."""
    beta1: float = 0.9
    """AdamW's first decay, or SGD's momentum."""
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    """Largest global gradient norm; 0 is no limit."""
    impl: Literal["plain", "fused"] = "plain"
    """AdamW compiled from plain operations, or torch's fused kernel."""


@dataclass(frozen=True)
class LogSettings:
    """Where metrics go beside the run folder."""

    wandb: bool = False
    """Log to wandb too (WANDB_MODE=offline works)."""
    project: str = "mtl"


@dataclass(frozen=True)
class CheckpointSettings:
    """When the run is saved, and what stays. It is also saved at its end, and when a signal stops it."""

    every: int = 0
    """Steps between saves; 0 saves at the end (and on a signal) alone."""
    every_minutes: float = 0.0
    """Minutes between saves; 0 counts steps alone."""
    final: bool = True
    """Save at the end."""
    keep: int = 0
    """The newest checkpoints that stay; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of every so many steps stay too."""
    keep_best: int = 0
    """So many checkpoints with the lowest metric stay too."""
    metric: str = "eval_loss"
    """The metric of keep-best, as metrics.jsonl calls it."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a save that fails does to the run: stop it at the next step, or go on and try again at the next save."""
    grace: float = 60.0
    """Seconds from a signal to the end of the run, with everything saved."""
    host_memory: float | None = None
    """GiB a process may take for copies; None is as much as its share of the state. With less, updates wait for the disk."""
    verify: bool = False
    """Check every byte of a checkpoint before resuming from it, and not only those that are read."""


@dataclass(frozen=True)
class TensorSettings:
    """Tensor parallelism, where mesh.tensor is above 1."""

    overlap: Literal["auto", "on", "off"] = "auto"
    """Take products in pieces, beside what copy engines gather for them and sum after them: auto where copy engines serve the run
    (see --transport), products are not in 8 bits and there is no pipeline."""


@dataclass(frozen=True)
class PipelineSettings:
    """The pipeline, where mesh.pipe is above 1."""

    schedule: str | None = None
    """gpipe, 1f1b (the default), interleaved, zb_h1, zb_v, or a text file with one line a device."""
    virtual: int | None = None
    """Stages a device; by default the schedule's own (2 for interleaved and zb_v, else 1)."""
    microbatches: int | None = None
    """Micro-batches a step; by default as many as global batch and micro-batch size make."""
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each stage; by default split so that the slowest stage, embedding and head counted, is as fast as can be."""


@dataclass(frozen=True)
class Experiment:
    """One pre-training run."""

    model: decoder.Config
    mesh: MeshSettings = field(default_factory=MeshSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    batch: BatchFlags = field(default_factory=BatchFlags)
    optim: OptimSettings = field(default_factory=OptimSettings)
    log: LogSettings = field(default_factory=LogSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    lora: Lora = field(default_factory=Lora)
    resume: Literal["never", "auto", "must"] = "never"
    """Go on with the run in --out: auto from its newest good checkpoint (from the start if it has none), must from its newest alone."""
    init: Annotated[str | None, tyro.conf.arg(metavar="hf:DIR")] = None
    """Start from the model in a folder of Hugging Face, or from a checkpoint or run of mtl (its folder); the preset says the rest."""
    tensor: TensorSettings = field(default_factory=TensorSettings)
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    rules: str | None = None
    """Parallel layout: a shipped table's name, a path to a table, or a module; by default chosen from the mesh."""
    precision: Literal["auto", "fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp8_rows"] = "auto"
    """auto is bf16 on GPUs, fp32 elsewhere."""
    transport: Literal["auto", "nccl", "engine"] = "auto"
    """How weights, gradients and pipelines' messages travel: by collectives or by copy engines. auto takes these where a compiled step
    has several GPUs of one host that reach each other, which are one pipeline or have none."""
    products: Literal["auto", "torch", "quack"] = "auto"
    """Who multiplies the layers' large matrices in bf16 and fp16: auto takes the kernels of quack-kernels on Hopper GPUs where it is
    installed (flash-attn-4 brings it), which take less power than torch's."""
    compile: Literal["auto", "none", "block", "step"] = "auto"
    """auto compiles the whole step on CUDA devices, nothing elsewhere."""
    remat: str = "none"
    """What is computed again in backward: none, gather, selective, mlp, mlp:N, dense, full, every:N, or auto[:100GiB, :80%]."""
    offload: Literal["none", "activations", "optimizer", "both"] = "none"
    """What is kept in host memory: inputs of the layers that are computed again in backward (activations), optimizer state and master
    weights (optimizer), or both. No number changes."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The run folder; by default runs/PRESET-TIME."""
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """So many steps are recorded (on the first device): the run's folder profile has a Chrome trace and a page on where time goes."""
    deterministic: bool = False
    """Bitwise the same numbers every time."""
