"""Ring attention: the sequence split in zig-zag order, keys and values passed round."""

BASE = "context"
ACT = {"key_seq": ("context",)}
