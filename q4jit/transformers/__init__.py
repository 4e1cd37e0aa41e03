"""Run GGUF files packed through transformers: `from_gguf` and `install`."""

# ruff: noqa: E402 - packages are checked before a module uses what older versions lack
from q4jit.transformers.installed import check_installed

check_installed()

import q4jit.torch  # noqa: F401 - checks the version of PyTorch
from q4jit.transformers.installation import install, uninstall
from q4jit.transformers.loading import from_gguf

__all__ = ["from_gguf", "install", "uninstall"]
