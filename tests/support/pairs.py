"""Choose cases that contain every pair of values instead of every combination."""

from collections.abc import Sequence

import pytest


def pairwise(
    names: str, first: Sequence[object], second: Sequence[object], third: Sequence[object]
) -> pytest.MarkDecorator:
    """Run a test on all pairs of `first` and `second`, with the values of `third` in turn.

    Every pair with a value of `third` occurs, because `third` is not longer than the others.
    """
    assert len(third) <= min(len(first), len(second))
    cases = [
        (a, b, third[(i + j) % len(third)])
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]
    return pytest.mark.parametrize(names.split(), cases)
