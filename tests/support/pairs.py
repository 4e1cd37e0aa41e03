"""Choose cases so that every two values meet, instead of all combinations."""

from collections.abc import Sequence

import pytest


def pairwise(
    names: str, first: Sequence[object], second: Sequence[object], third: Sequence[object]
) -> pytest.MarkDecorator:
    """Run a test on all pairs of `first` and `second`; the values of `third` take turns.

    Each of them meets every value of the others: `third` is no longer than they are.
    """
    assert len(third) <= min(len(first), len(second))
    cases = [
        (a, b, third[(i + j) % len(third)])
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]
    return pytest.mark.parametrize(names.split(), cases)
