"""All of replica x fsdp x context x tensor; heads split over tensor, then context, inside attention."""

BASE = "fsdp_context_tensor"
ACT = {"query_seq": (), "core_heads": ("tensor", "context"), "core_kv_heads": ("tensor", "context")}
ORDER = "contiguous"
