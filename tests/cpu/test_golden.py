"""Generated texts, kept as files: a change of the generators shows as a change of these.

`pytest tests/cpu/test_golden.py --update-golden` writes them again; review the difference.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from q4jit import QuantizedTensor
from q4jit.compilers import llvm
from q4jit.cpu.lower import lower
from q4jit.floats import numpy_dtype
from q4jit.runtime.cpu import undefined_symbols
from q4jit.targets import find_target
from q4jit.weights.layouts import INTERLEAVED16
from tests.support.kernels import lowered, random_x, weight
from tests.support.layouts import held_in

Golden = Callable[[str, str], None]


def check(golden: Golden, function: Callable[..., Any], target: str, args: list[Any]) -> None:
    """Check that the only kernel of a function has the golden text, and that it compiles."""
    cpu = find_target(target)
    plan = lowered(function, cpu, args)
    (kernel,) = plan.kernels
    source = lower(plan, kernel)
    assert not undefined_symbols(llvm.compile_object(source.text, cpu))
    golden(source.text, source.suffix)


def test_q4_0_times_one_row_on_avx512(golden: Golden) -> None:
    def product(x: Any, w: QuantizedTensor) -> Any:
        return x @ w

    check(golden, product, "cpu:x86-64-v4", [random_x(1, 4096), weight("Q4_0", 4096, 64).tensor])


def test_q4_0_times_one_row_on_vnni(golden: Golden) -> None:
    def product(x: Any, w: QuantizedTensor) -> Any:
        return x @ w

    args = [random_x(1, 4096), weight("Q4_0", 4096, 64).tensor]
    check(golden, product, "cpu:x86-64-v4+avx512vnni", args)


def test_norm_bias_and_residual_on_avx2(golden: Golden) -> None:
    def layer(x: Any, gain: Any, w: QuantizedTensor, bias: Any, residual: Any) -> Any:
        h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
        return h @ w + bias + residual

    w = weight("F32", 64, 40).tensor
    args = [random_x(1, 64), random_x(64), w, random_x(40), random_x(1, 40)]
    check(golden, layer, "cpu:x86-64-v3", args)


def test_rows_of_panels_of_q5_k_on_avx512(golden: Golden) -> None:
    def rows(ids: Any, w: QuantizedTensor) -> Any:
        return w.rows(ids)

    table = held_in(INTERLEAVED16, weight("Q5_K", 768, 40).tensor)
    check(golden, rows, "cpu:x86-64-v4", [np.arange(3), table])


def test_one_column_of_q8_0_on_aarch64(golden: Golden) -> None:
    def column(x: Any, w: QuantizedTensor) -> Any:
        return x @ w

    check(golden, column, "cpu:aarch64", [random_x(3, 256), weight("Q8_0", 256, 1).tensor])


def test_halves_without_f16c(golden: Golden) -> None:
    def add(x: Any, w: QuantizedTensor, residual: Any) -> Any:
        y = x @ w
        return y, (y + residual).astype(np.float16)

    w, residual = weight("F32", 64, 40).tensor, random_x(1, 40).astype(np.float16)
    check(golden, add, "cpu:x86-64", [random_x(1, 64).astype(numpy_dtype("bf16")), w, residual])


def test_one_row_times_q4_0_transposed_on_avx512(golden: Golden) -> None:
    def product(y: Any, w: QuantizedTensor) -> Any:
        return y @ w.T

    w = weight("Q4_0", 64, 2000).tensor
    check(golden, product, "cpu:x86-64-v4", [random_x(1, 2000), w])


def test_a_slice_of_many_rows_times_q6_k_transposed_on_avx2(golden: Golden) -> None:
    def product(y: Any, w: QuantizedTensor) -> Any:
        return (y @ w.T)[..., 5:200]

    w = weight("Q6_K", 256, 2000).tensor
    check(golden, product, "cpu:x86-64-v3", [random_x(33, 2000), w])
