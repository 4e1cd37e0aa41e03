"""Choose cases that contain every pair of values instead of every combination."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import pytest

_Case = TypeVar("_Case", bound=NamedTuple)


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


def in_turn(names: str, first: Sequence[object], *others: Sequence[object]) -> pytest.MarkDecorator:
    """Run a test on every value of `first`, with the values of the other sequences in turn."""
    cases = [(a, *(each[i % len(each)] for each in others)) for i, a in enumerate(first)]
    return pytest.mark.parametrize(names.split(), cases)


def pairs_in(cases: Iterable[Any]) -> set[tuple[tuple[int, object], ...]]:
    """Return every pair of values that occurs together in a case, with the places of the two."""
    return {pair for case in cases for pair in itertools.combinations([*enumerate(case)], 2)}


def covering(cases: Iterable[_Case]) -> list[_Case]:
    """Return a few of the cases, in which every pair of values occurs that occurs in all."""
    left = {case: pairs_in([case]) for case in cases}
    chosen: list[_Case] = []
    while left:
        best = max(left, key=lambda case: len(left[case]))  # the first of equals
        covered = left.pop(best)
        if not covered:
            break
        chosen.append(best)
        for pairs in left.values():
            pairs.difference_update(covered)
    return chosen
