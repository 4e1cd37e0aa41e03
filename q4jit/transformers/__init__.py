"""Run GGUF files packed through transformers: `from_gguf` and `install`."""

from q4jit.transformers.installation import install, uninstall

__all__ = ["install", "uninstall"]
