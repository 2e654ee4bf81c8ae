"""All of replica x fsdp x context x tensor; keys and values gathered over context."""

BASE = "fsdp_tensor"
STORE = {"embed": ("pipe", "fsdp", "context")}
ACT = {"residual_seq": ("context", "tensor"), "seq": ("context",), "query_seq": ("context",)}
ORDER = "zigzag"
