"""Small models and meshes that the tests share: every switch of the decoder is on in at least one of them."""

from dataclasses import replace

from mtl.models.decoder import Config
from mtl.ops.rotary import RopeScaling
from mtl.sharding.mesh import MeshShape

LLAMA = Config(250, 2, 32, 8, 2, 48, head_size=4, rope_theta=500.0)
GPT = Config(
    250, 2, 32, 8, 8, 64, head_size=4, norm="layer", norm_bias=True, positions="learned", max_positions=40, activation="gelu_tanh",
    qkv_bias=True, out_bias=True, mlp_bias=True, tied=True, dropout_embed=0.1, dropout_attention=0.1, dropout_mlp=0.1,
)  # fmt: skip
FALCON = Config(
    250, 2, 32, 8, 1, 64, head_size=4, norm="layer", norm_bias=True, activation="gelu", tied=True, parallel="one_norm", rope_theta=500.0
)
MODELS = {
    "llama": LLAMA,
    "llama_tied": replace(
        LLAMA, tied=True, kv_heads=4, qk_norm=True, rope_pairs="interleaved", activation="geglu",
        rope_scaling=RopeScaling("dynamic", 4.0, 5),
    ),
    "gpt": GPT,
    "falcon": FALCON,
    "mistral": replace(
        FALCON, kv_heads=2, parallel="two_norms", window=7, z_loss=1e-3, norm="rms", norm_bias=False, activation="reglu", tied=False,
        loss_impl="fused",
    ),
    "alibi": replace(
        FALCON, kv_heads=4, positions="alibi", parallel="none", window=7, full_layers=(1,), attention_scale=0.4, scale_by_layer=True,
        norm_bias=False,
    ),
}  # fmt: skip
SEQ, BATCH = 32, 24

MESHES = {
    "single": {1: MeshShape()},
    "ddp": {n: MeshShape(replica=n) for n in (2, 4, 8)},
    "zero1": {2: MeshShape(fsdp=2), 4: MeshShape(replica=4), 8: MeshShape(replica=2, fsdp=4)},
    "fsdp": {n: MeshShape(fsdp=n) for n in (2, 4, 8)},
    "hsdp": {2: MeshShape(replica=2), 4: MeshShape(replica=2, fsdp=2), 8: MeshShape(replica=2, fsdp=4)},
    "tensor": {2: MeshShape(tensor=2), 4: MeshShape(tensor=4), 8: MeshShape(replica=2, tensor=4)},
    "fsdp_tensor": {2: MeshShape(tensor=2), 4: MeshShape(fsdp=2, tensor=2), 8: MeshShape(fsdp=2, tensor=4)},
    "context": {2: MeshShape(context=2), 4: MeshShape(context=4), 8: MeshShape(replica=2, fsdp=2, context=2)},
    "ring": {2: MeshShape(context=2), 4: MeshShape(context=4), 8: MeshShape(fsdp=2, context=4)},
    "ulysses": {2: MeshShape(context=2), 4: MeshShape(context=4), 8: MeshShape(replica=2, fsdp=2, context=2)},
    "fsdp_context_tensor": {
        2: MeshShape(context=2),
        4: MeshShape(context=2, tensor=2),
        8: MeshShape(fsdp=2, context=2, tensor=2),
    },
    "fsdp_ring_tensor": {2: MeshShape(context=2), 4: MeshShape(context=2, tensor=2), 8: MeshShape(replica=2, context=2, tensor=2)},
    "fsdp_ulysses_tensor": {2: MeshShape(tensor=2), 4: MeshShape(context=2, tensor=2), 8: MeshShape(fsdp=2, context=2, tensor=2)},
}
