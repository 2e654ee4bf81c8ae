"""The runs that plans are held against: models from 124M to the 8B's shapes, every table, remat, two sequence lengths, one to four GPUs."""

from dataclasses import dataclass

from mtl.sharding.mesh import MeshShape

ALONE = MeshShape()


@dataclass(frozen=True)
class Case:
    """One run. ``layers`` 0 is the preset's number; ``micro`` samples go through at once, ``accumulate`` times a step."""

    preset: str
    layers: int = 0
    mesh: MeshShape = ALONE
    rules: str = "single"
    micro: int = 1
    seq: int = 8192
    remat: str = "none"
    compile: str = "step"
    precision: str = "bf16"
    accumulate: int = 1
    schedule: str = ""
    """Of the pipeline, where the mesh has one; ``accumulate`` counts its micro-batches then."""
    split: tuple[int, ...] = ()
    """Layers of each stage, where they are not the default's."""

    def __str__(self) -> str:
        """Name it in a line of the table."""
        parts = [f"{self.preset}{f' x{self.layers}' if self.layers else ''}", f"{self.micro} x {self.seq}", f"remat {self.remat}"]
        parts += [f"compile {self.compile}"] if self.compile != "step" else []
        parts += [self.precision] if self.precision != "bf16" else []
        parts += [f"{self.accumulate} micro-batches"] if self.accumulate > 1 else []
        parts += [self.schedule] if self.schedule else []
        return ", ".join(parts + ([" ".join(str(n) for n in self.split)] if self.split else []))


ONE: tuple[Case, ...] = (
    Case("gpt2_124m", micro=16, seq=1024),
    Case("llama3_8b", 4, micro=2, seq=8192),
    Case("llama3_8b", 4, micro=2, seq=8192, precision="fp8"),
    Case("llama_1b", 8, micro=4, seq=2048, remat="selective"),
    Case("llama3_8b", 4, micro=4, seq=8192, remat="full"),
    Case("qwen3_8b", 2, micro=2, seq=4096),
    Case("llama2_7b", 4, micro=4, seq=4096, remat="selective"),
    Case("mistral_7b", 2, micro=1, seq=8192),
    Case("llama_1b", 4, micro=2, seq=4096, accumulate=4),
    Case("llama3_8b", 4, micro=2, seq=4096, compile="none"),
    Case("llama3_8b", 4, micro=2, seq=4096, compile="block"),
    Case("falcon_7b", 2, micro=4, seq=2048),
    Case("llama_1b", 4, micro=8, seq=2048, remat="full"),
    Case("gpt2_124m", micro=32, seq=1024, remat="full"),
    Case("llama3_8b", 4, micro=1, seq=16384, remat="selective"),
    Case("qwen2_5_7b", 4, micro=2, seq=4096, remat="every:2"),
    Case("gpt2_124m", micro=16, seq=1024, remat="selective"),
)

TWO: tuple[Case, ...] = (
    Case("llama3_8b", 4, MeshShape(fsdp=2), "fsdp", 2, 8192),
    Case("llama3_8b", 4, MeshShape(tensor=2), "tensor", 2, 8192),
    Case("llama3_8b", 2, MeshShape(context=2), "context", 2, 8192),
    Case("llama3_8b", 4, MeshShape(pipe=2), "single", 1, 4096, accumulate=8, schedule="1f1b"),
    Case("llama3_8b", 2, MeshShape(replica=2), "zero1", 1, 8192, "selective"),
    Case("llama3_8b", 2, MeshShape(context=2), "ring", 2, 8192),
    Case("llama3_8b", 2, MeshShape(context=2), "ulysses", 2, 8192),
    Case("llama_1b", 4, MeshShape(replica=2), "ddp", 4, 2048),
    Case("llama3_8b", 2, MeshShape(tensor=2), "fsdp_tensor", 4, 4096, "selective"),
    Case("llama3_8b", 2, MeshShape(fsdp=2), "hsdp", 2, 4096, accumulate=2),
    Case("llama3_8b", 2, MeshShape(tensor=2), "fsdp_context_tensor", 2, 4096, "full"),
    Case("llama3_8b", 2, MeshShape(context=2), "fsdp_ulysses_tensor", 2, 4096),
    Case("llama3_8b", 2, MeshShape(context=2), "fsdp_ring_tensor", 2, 4096, "full"),
    Case("llama3_8b", 4, MeshShape(fsdp=2), "fsdp", 4, 4096, "full", precision="fp8"),
    Case("llama3_8b", 4, MeshShape(pipe=2), "single", 1, 4096, accumulate=8, schedule="zb_v"),
    Case("qwen3_8b", 2, MeshShape(fsdp=2), "fsdp", 2, 4096),
    Case("llama3_8b", 4, MeshShape(fsdp=2), "fsdp", 2, 4096, compile="block"),
)

FOUR: tuple[Case, ...] = (
    Case("llama3_8b", 4, MeshShape(fsdp=4), "fsdp", 2, 8192),
    Case("llama3_8b", 4, MeshShape(tensor=4), "tensor", 2, 8192),
    Case("llama3_8b", 4, MeshShape(fsdp=2, tensor=2), "fsdp_tensor", 2, 8192),
    Case("llama3_8b", 4, MeshShape(fsdp=4), "fsdp", 4, 8192, "full"),
    Case("llama3_8b", 4, MeshShape(fsdp=4), "fsdp", 2, 8192, precision="fp8"),
    Case("llama3_8b", 4, MeshShape(context=4), "context", 2, 8192),
    Case("llama_1b", 8, MeshShape(replica=4), "ddp", 4, 2048),
    Case("llama3_8b", 4, MeshShape(replica=4), "zero1", 1, 8192, "selective"),
    Case("llama3_8b", 4, MeshShape(replica=2, fsdp=2), "hsdp", 2, 4096),
    Case("llama3_8b", 4, MeshShape(context=4), "ulysses", 2, 8192),
    Case("llama3_8b", 4, MeshShape(context=4), "ring", 2, 8192),
    Case("llama3_8b", 4, MeshShape(context=2, tensor=2), "fsdp_context_tensor", 2, 8192, "selective"),
    Case("llama3_8b", 4, MeshShape(fsdp=2, context=2), "fsdp_ulysses_tensor", 2, 8192),
    Case("llama3_8b", 4, MeshShape(fsdp=2, context=2), "fsdp_ring_tensor", 1, 8192, "full"),
    Case("qwen3_8b", 4, MeshShape(tensor=4), "tensor", 4, 4096, "full"),
    Case("llama3_8b", 4, MeshShape(fsdp=4), "fsdp", 1, 4096, accumulate=4),
    Case("gpt2_124m", 0, MeshShape(replica=4), "ddp", 16, 1024),
    Case("llama3_8b", 8, MeshShape(pipe=4), "single", 1, 4096, accumulate=8, schedule="1f1b"),
    Case("llama3_8b", 8, MeshShape(pipe=2, tensor=2), "tensor", 1, 8192, accumulate=8, schedule="1f1b"),
    Case("llama3_8b", 8, MeshShape(pipe=4), "single", 1, 4096, accumulate=8, schedule="zb_h1"),
    Case("llama3_8b", 8, MeshShape(pipe=4), "single", 1, 4096, "full", accumulate=8, schedule="interleaved"),
)

CASES = {1: ONE, 2: TWO, 4: FOUR}
