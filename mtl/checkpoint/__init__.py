"""Checkpoints: global arrays that any mesh reads, in a layout that Orbax restores."""

from mtl.checkpoint.contents import ArrayInfo, Contents, inspect, structure
from mtl.checkpoint.peers import CheckpointError
from mtl.checkpoint.restore import restore
from mtl.checkpoint.save import save

__all__ = ["ArrayInfo", "CheckpointError", "Contents", "inspect", "restore", "save", "structure"]
