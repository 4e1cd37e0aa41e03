"""Compare results of calls bit for bit, and count the graphs of PyTorch's compiler."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def assert_same(made: Any, wanted: Any) -> None:
    """Raise AssertionError unless two results have the same containers, tensors and values."""
    leaves, tree = pytree.tree_flatten(made)
    expected, expected_tree = pytree.tree_flatten(wanted)
    assert tree == expected_tree
    for leaf, value in zip(leaves, expected, strict=True):
        assert type(leaf) is type(value)
        if isinstance(value, Tensor):
            assert (leaf.dtype, leaf.shape, leaf.device) == (value.dtype, value.shape, value.device)
            assert torch.equal(bits(leaf), bits(value))  # NaN is equal to NaN
        else:
            assert leaf == value


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Graphs:
    """A backend of torch.compile that counts the graphs.

    Attributes:
        count: of the graphs so far.
        calls: the operator's calls in the last graph.
    """

    def __init__(self) -> None:
        self.count = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        """Return the graph as it is."""
        self.count += 1
        self.calls = sum(node.target is torch.ops.q4jit.call.default for node in graph.graph.nodes)
        return graph
