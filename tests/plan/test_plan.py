"""Plans: how a graph is cut into kernels, and how a plan is printed."""

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from q4jit.backends import find_backend
from q4jit.cpu.schedule import CpuPlan, make_plan, tile_of
from q4jit.dispatch.options import Options
from q4jit.dispatch.policy import cost_of
from q4jit.frontend.specs import ArraySpec, Spec, WeightSpec, array_spec
from q4jit.frontend.trace import trace
from q4jit.plan.options import PlanOptions
from q4jit.targets import find_target

V3 = find_target("cpu:x86-64-v3")
M, K, N, HIDDEN = 3, 64, 48, 96


def w(k: int = K, n: int = N) -> WeightSpec:
    return WeightSpec("Q4_0", k, n)


def a(*shape: int) -> ArraySpec:
    return array_spec(shape)


X, GAIN, BIAS, RESIDUAL = a(M, K), a(K), a(N), a(M, N)


def plan(function: Callable[..., object], *specs: Spec, m: int = M) -> CpuPlan:
    return make_plan(trace(function, specs), V3, m)


def assert_reads(cpu_plan: CpuPlan, text: str) -> None:
    assert str(cpu_plan) == textwrap.dedent(text).strip()


def normalised(x: Any, gain: Any) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain


# --- plans in full ------------------------------------------------------------------------------


def test_rmsnorm_and_three_products_are_one_kernel() -> None:
    def qkv(x: Any, gain: Any, wq: Any, wk: Any, wv: Any) -> Any:
        n = normalised(x, gain)
        return n @ wq, n @ wk, n @ wv

    assert_reads(
        plan(qkv, X, GAIN, w(n=64), w(n=32), w(n=32)),
        """
        plan qkv for cpu:x86-64-v3
          kernel qkv: 3 rows a tile
            rows:
              v10 = x / sqrt(sum(x * x) / 64 + 1e-05) * gain
            64 columns:
              v11 = v10 @ wq    Q4_0 [64, 64]
              output0 = v11
            32 columns:
              v12 = v10 @ wk    Q4_0 [64, 32]
              output1 = v12
            32 columns:
              v13 = v10 @ wv    Q4_0 [64, 32]
              output2 = v13
        """,
    )


def test_gate_up_and_down_are_two_kernels() -> None:
    def mlp(x: Any, gain: Any, gate: Any, up: Any, down: Any) -> Any:
        n = normalised(x, gain)
        g = n @ gate
        return x + (g / (1 + np.exp(-g)) * (n @ up)) @ down

    assert_reads(
        plan(mlp, X, GAIN, w(K, HIDDEN), w(K, HIDDEN), w(HIDDEN, K)),
        """
        plan mlp for cpu:x86-64-v3
          kernel mlp_0: 3 rows a tile
            rows:
              v10 = x / sqrt(sum(x * x) / 64 + 1e-05) * gain
            96 columns:
              v11 = v10 @ gate    Q4_0 [64, 96]
              v17 = v10 @ up    Q4_0 [64, 96]
              temp0 = v11 / (1 + exp(-v11)) * v17
          kernel mlp_1: 3 rows a tile
            rows:
              v18 = temp0
            64 columns:
              v19 = v18 @ down    Q4_0 [96, 64]
              output0 = x + v19
        """,
    )


def test_bias_activation_and_residual_are_fused() -> None:
    def residual(x: Any, w: Any, r: Any, bias: Any) -> Any:
        return r + np.tanh(x @ w + bias)

    assert_reads(
        plan(residual, X, w(), RESIDUAL, BIAS),
        """
        plan residual for cpu:x86-64-v3
          kernel residual: 3 rows a tile
            rows:
              v0 = x
            48 columns:
              v3 = v0 @ w    Q4_0 [64, 48]
              output0 = r + tanh(v3 + bias)
        """,
    )


def test_a_reduction_over_a_product_splits() -> None:
    def normed(x: Any, w: Any) -> Any:
        y = x @ w
        return y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + 1)

    assert_reads(
        plan(normed, X, w()),
        """
        plan normed for cpu:x86-64-v3
          kernel normed_0: 3 rows a tile
            rows:
              v0 = x
            48 columns:
              v1 = v0 @ w    Q4_0 [64, 48]
              temp0 = v1
          kernel normed_1: 3 rows a tile
            rows:
              output0 = temp0 / sqrt(sum(temp0 * temp0) / 48 + 1)
        """,
    )


def test_aligned_slices_of_a_fused_weight_are_one_pass() -> None:
    def gated(x: Any, gate_up: Any) -> Any:
        y = x @ gate_up
        return y[..., :48] * y[..., 48:]

    assert_reads(
        plan(gated, X, w(n=HIDDEN)),
        """
        plan gated for cpu:x86-64-v3
          kernel gated: 3 rows a tile
            rows:
              v0 = x
            48 columns:
              v2 = v0 @ gate_up    Q4_0 [64, 96]
              v3 = v0 @ gate_up[:, 48:96]    Q4_0 [64, 96]
              output0 = v2 * v3
        """,
    )


def test_a_result_of_one_row_and_one_of_all_rows() -> None:
    def both(x: Any, w: Any, r: Any) -> Any:
        y = x @ w
        return y, y + r

    assert_reads(
        plan(both, a(1, K), w(), RESIDUAL),
        """
        plan both for cpu:x86-64-v3
          kernel both_0: M = 1
            rows:
              v0 = x
            48 columns:
              v2 = v0 @ w    Q4_0 [64, 48]
              output0 = v2
          kernel both_1: 3 rows a tile
            rows:
              v0 = x
            48 columns:
              v2 = v0 @ w    Q4_0 [64, 48]
              output1 = v2 + r
        """,
    )


def test_dequantise_alone() -> None:
    assert_reads(
        plan(lambda w: w.dequantize(), w()),
        """
        plan lambda for cpu:x86-64-v3
          kernel lambda: the whole weight
            output0 = w.dequantize()
        """,
    )


# --- how many kernels, and which values they store ----------------------------------------------


def test_a_product_of_one_column_is_stored_in_a_temporary() -> None:
    split = plan(lambda x, w, gate: (x @ w) * np.tanh(x @ gate), X, w(), w(n=1))
    assert split.temps == (N, 1)
    assert [[k.schedule_of(s) for s in k.work.sections] for k in split.kernels] == [
        ["columns", "dot"],
        [],
    ]


def test_products_of_different_x_are_different_kernels() -> None:
    split = plan(lambda x, w, v: x @ w + (2 * x) @ v, X, w(), w())
    assert [len(k.work.sections) for k in split.kernels] == [1, 1]
    assert split.temps == (N,)


def test_the_same_expression_twice_is_one_product() -> None:
    (kernel,) = plan(lambda x, w: (x * 2) @ w + (x * 2) @ w, X, w()).kernels
    (section,) = kernel.work.sections
    assert len(section.products) == 1


def test_a_function_without_products_is_one_kernel_of_rows() -> None:
    (kernel,) = plan(lambda x, gain: (normalised(x, gain), x.sum(-1)), X, GAIN).kernels
    assert kernel.work.x is None
    assert kernel.work.sections == ()
    assert [s.buffer.kind for s in kernel.work.rows] == ["output", "output"]


def test_a_value_returned_twice_is_written_twice() -> None:
    (kernel,) = plan(lambda x, w: (lambda y: (y, y))(x @ w), X, w()).kernels
    (section,) = kernel.work.sections
    assert len(section.products) == 1
    assert sorted(str(s.buffer) for s in section.stores) == ["output0", "output1"]


def test_values_that_follow_from_others_are_not_stored() -> None:
    def function(x: Any, w: Any, down: Any) -> Any:
        y = np.tanh(x @ w)
        return y @ down, (y * 2) @ down  # one x follows from the other

    assert plan(function, X, w(), w(N, K)).temps == (N,)


def test_truth_values_are_not_stored() -> None:
    split = plan(lambda x, w, v: np.where(x @ w > 0, (x * 2) @ v, 0.0), X, w(), w())
    stores = [t for k in split.kernels for s in k.work.sections for t in s.stores]
    assert stores
    assert not any(t.node.is_bool for t in stores)


@pytest.mark.parametrize(
    ("start", "stop", "schedule"),
    [(0, 16, "columns"), (16, 40, "columns"), (5, 21, "dot"), (0, 7, "dot")],
)
def test_schedule_of_a_slice(start: int, stop: int, schedule: str) -> None:
    (kernel,) = plan(lambda x, w: (x @ w)[..., start:stop], X, w()).kernels
    (section,) = kernel.work.sections
    assert (section.width, kernel.schedule_of(section)) == (stop - start, schedule)


def test_a_plan_depends_on_the_class_of_m_alone() -> None:
    def texts(rows: range) -> set[str]:
        return {str(plan(lambda x, w: x @ w, X, w(), m=m)) for m in rows}

    assert len(texts(range(1, 1000))) <= 8
    assert len(texts(range(100, 1000))) == 1


@pytest.mark.parametrize("target", ["cpu:x86-64", "cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:aarch64"])
def test_a_tile_never_has_more_rows_than_x(target: str) -> None:
    for m in range(1, 200):
        assert 1 <= tile_of(find_target(target), m).rows <= m
    assert tile_of(find_target(target), 0).rows >= 1


def test_a_chain_of_truth_values_longer_than_pythons_stack() -> None:
    def function(x: Any, w: Any) -> Any:
        y = x @ w
        chosen = y > 0
        for i in range(2000):
            chosen = chosen | (y > i)
        return np.where(chosen, np.sum(y, axis=-1, keepdims=True), y)

    assert plan(function, X, w()).temps == (N,)


def test_a_safe_softmax_is_one_rows_phase() -> None:
    def softmax(x: Any) -> Any:
        e = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return e / np.sum(e, axis=-1, keepdims=True)

    made = plan(lambda x, w: (softmax(x) @ w, softmax(x)), X, w())
    assert (len(made.kernels), made.temps) == (1, ())
    after = plan(lambda x, w: softmax(x @ w), X, w())
    assert (len(after.kernels), after.temps) == (2, (N,))


# --- graphs with many paths ---------------------------------------------------------------------


def gelu(y: Any) -> Any:
    return 0.5 * y * (1 + np.tanh(0.79 * (y + 0.044 * y**3)))


def gelus_behind_a_product(y: Any) -> Any:
    for _ in range(60):
        y = gelu(y)
    return y


def chosen_by_truth_values(y: Any) -> Any:
    for _ in range(60):
        y = np.where((y > 0) & (y < 9), y * 0.5, abs(y))
    return y[..., :9]


def across_phases(y: Any) -> Any:
    total = np.sum(y, -1, keepdims=True)
    for _ in range(60):
        total = gelu(total)
        y = gelu(y) + total
    return y / np.sum(y, -1, keepdims=True), y, total


def truth_values_across_phases(y: Any) -> Any:
    chosen = y > 0
    for i in range(60):
        chosen = (chosen & (y > i)) | ~chosen
    return np.where(chosen, np.sum(y, -1, keepdims=True), y)


SHARED = [
    gelus_behind_a_product,
    chosen_by_truth_values,
    across_phases,
    truth_values_across_phases,
]


@pytest.mark.parametrize("function", SHARED)
@pytest.mark.parametrize(
    "around",
    [
        lambda f: lambda x, w: f(x @ w),
        lambda f: lambda x, w: f(x)[0] @ w if isinstance(f(x), tuple) else f(x * 2 + x) * 2,
        lambda f: lambda x, w, v: f((x @ w) + (x * 2) @ v),
    ],
    ids=["epilogue", "prologue", "two kernels"],
)
def test_a_graph_of_many_paths_is_planned_and_written(
    function: Callable[..., Any], around: Callable[..., Any]
) -> None:
    """Each of the 60 levels uses a value several times: a walk along every path does not end."""
    traced = around(function)
    specs: list[Spec] = [X, w(), w()]
    graph = trace(traced, tuple(specs[: traced.__code__.co_argcount]))
    Options(K=K).check(graph.outputs, graph.nodes())
    cost_of(graph, M)
    for name in ("cpu:x86-64-v3", "hip:gfx1100", "hip:sm_90"):
        target = find_target(name)
        backend = find_backend(target)
        made = backend.plan(graph, target, M, PlanOptions(), None)
        assert str(made)
        for kernel in made.kernels:
            assert backend.render(made, kernel).text


def test_long_names_of_arguments() -> None:
    """LLVM ends names of values at 1,024 letters, and a product is described on one line."""
    for length in (39, 40, 41, 68, 300, 2000):
        long = "v" * length
        namespace: dict[str, Any] = {}
        exec(f"def {long}(x, {long}, {long}2): return x @ {long}, x @ {long}2", namespace)
        made = plan(namespace[long], X, w(), w(K, 32))
        assert all(len(name) <= 42 for name in made.graph.names)
        assert len(set(made.graph.names)) == 3
        assert all(len(line) < 100 for line in str(made).splitlines())
