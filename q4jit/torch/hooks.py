"""Hooks of modules, which a module in their place would not have."""

from typing import Final

from torch import nn

HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""The attributes of a module that hold its hooks."""


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks of any kind."""
    return any(getattr(module, kind) for kind in HOOKS)
