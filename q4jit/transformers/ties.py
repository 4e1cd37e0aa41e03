"""Keeps `tie_weights` of transformers away from weights that are no parameters."""

from collections.abc import Iterable

from torch import nn


def forget_ties(model: nn.Module, names: Iterable[str]) -> None:
    """Let `tie_weights` pass over modules that have a `Weight` where it looks for a parameter.

    Libraries for adapters call it. A tied head shares the embedding's `Weight` already.
    """
    replaced = {f"{name}.weight" for name in names}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        ties = getattr(model, attribute, None)
        if ties:
            kept = {target: source for target, source in ties.items() if target not in replaced}
            setattr(model, attribute, kept)
