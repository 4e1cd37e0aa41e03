"""How q4jit requests DLPack capsules from other libraries."""

from typing import Any

import pytest

from q4jit.arrays import dlpack
from q4jit.errors import ArgumentError


def lent() -> object:
    tensor = dlpack.Tensor(64, (2, 3), None, "float32", 0, readonly=False, owner=None)
    return dlpack.produce(tensor, 2, versioned=False)


def test_a_library_without_versions() -> None:
    class Old:
        def __dlpack__(self, stream: Any = None) -> object:
            return lent()

    assert dlpack.consume(Old()).shape == (2, 3)


def test_another_type_error_is_passed_on() -> None:
    calls = []

    class Failing:
        def __dlpack__(self, **_: Any) -> object:
            calls.append(1)
            raise TypeError("unsupported operand")

    with pytest.raises(TypeError, match="unsupported operand"):
        dlpack.consume(Failing())
    assert len(calls) == 1


@pytest.mark.parametrize("old", [False, True])
def test_a_failed_export_is_an_argument_error(old: bool) -> None:
    class Unexportable:
        def __dlpack__(self, **options: Any) -> object:
            if old and options:
                raise TypeError("__dlpack__() takes no keyword arguments")
            raise BufferError("it requires a gradient")

    with pytest.raises(ArgumentError, match=r"Unexportable.*requires a gradient"):
        dlpack.consume(Unexportable())
