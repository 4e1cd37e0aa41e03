"""Fused decoder layers: `fuse` puts decorated functions in place of a layer's arithmetic."""

from q4jit.torch.fusion.fuse import fuse, unfuse

__all__ = ["fuse", "unfuse"]
