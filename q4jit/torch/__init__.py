"""Decorated functions in programs of PyTorch: compiled, exported, differentiated, sharded.

Importing this package lets PyTorch's compiler trace calls of decorated functions, and lets tensors
that track gradients be arguments. It needs the extra `torch`.
"""

# ruff: noqa: E402 - PyTorch is checked before a module uses what older versions lack
from q4jit.torch.installed import check_installed

check_installed()

from q4jit.dispatch import pytorch
from q4jit.torch import gradients  # noqa: F401 - registers the operator's gradient
from q4jit.torch.bridge import TorchBridge
from q4jit.torch.fusion import fuse, unfuse
from q4jit.torch.modules import Embedding, Experts, Linear
from q4jit.torch.replace import replace_linears
from q4jit.torch.weight import Weight

__all__ = ["Embedding", "Experts", "Linear", "Weight", "fuse", "replace_linears", "unfuse"]

pytorch.bridge = TorchBridge()
