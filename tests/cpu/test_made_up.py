"""A format that exists only in tests, in every schedule of a CPU: a description is enough."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pytest

from q4jit import specialize
from q4jit.cpu.schedule import COLUMNS, DOT, TRANSPOSED
from q4jit.precision import BOUNDS
from q4jit.targets import find_target
from tests.support.kernels import (
    IN_PROCESS,
    Guarded,
    assert_contract,
    dequantizer,
    each_guarded,
    lookups,
    lowered,
    one_product,
    random_x,
    require_target,
    run_guarded,
    some_ids,
    turned,
)
from tests.support.made_up import made_up_weight, registered
from tests.support.pairs import pairwise

K: Final = 192  # three blocks
ROWS: Final = (1, 6, 33)

every_target = pytest.mark.parametrize("target", IN_PROCESS)


@pytest.fixture(autouse=True)
def _made_up_format() -> Iterator[None]:
    with registered():
        yield


def transposed(y: Any, w: Any) -> Any:
    return y @ w.T


@pairwise("target m precision", IN_PROCESS, ROWS, [*BOUNDS])
@pytest.mark.parametrize(("n", "schedule"), [(37, COLUMNS), (5, DOT)])
def test_products(m: int, n: int, schedule: str, precision: str, target: str) -> None:
    x, w = random_x(m, K), made_up_weight(K, n)
    plan = lowered(one_product, find_target(target), [x, w.tensor], precision)
    (kernel,) = plan.kernels
    assert [kernel.schedule_of(section) for section in kernel.work.sections] == [schedule]
    function = specialize(one_product, target=require_target(target), precision=precision)
    assert_contract(function(x, w.tensor), x, w, BOUNDS[precision])


@every_target
@pytest.mark.parametrize("m", ROWS)
def test_transposed_products(m: int, target: str) -> None:
    y, w = random_x(m, 37), made_up_weight(K, 37)
    plan = lowered(transposed, find_target(target), [y, w.tensor])
    (kernel,) = plan.kernels
    assert [kernel.schedule_of(section) for section in kernel.work.sections] == [TRANSPOSED]
    function = specialize(transposed, target=require_target(target))
    assert_contract(function(y, w.tensor), y, turned(w))


@every_target
def test_values_and_rows(target: str) -> None:
    w, ids = made_up_weight(K, 37), some_ids(5)
    values = specialize(dequantizer(1), target=require_target(target))(w.tensor)[0]
    np.testing.assert_array_equal(values, w.values)
    rows = specialize(lookups(1), target=target)(ids, w.tensor)[0]
    np.testing.assert_array_equal(rows, w.values.T[ids])
    np.testing.assert_array_equal(w.tensor.dequantize(), w.values)


@each_guarded([Guarded("cpu:aarch64"), Guarded("cpu:x86-64-v3", native=True)])
def test_beside_guard_pages(cpu: Guarded) -> None:
    x, wide, narrow = random_x(2, K), made_up_weight(K, 37), made_up_weight(K, 5)
    for w in (wide, narrow):
        (y,) = run_guarded(one_product, cpu, [x, w.tensor])
        assert_contract(y, x, w)
