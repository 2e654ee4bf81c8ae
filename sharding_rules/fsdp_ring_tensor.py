"""All of replica x fsdp x context x tensor, with ring attention over context."""

BASE = "fsdp_context_tensor"
ACT = {"key_seq": ("context",)}
