"""Texts of HIP kernels: where their lines come from, and the names in them."""

import inspect
import keyword
import re
from typing import Any

import jinja2
import numpy as np
import pytest

from q4jit import CompileError
from q4jit.compilers.find import find_compiler
from q4jit.hip.kernel import GEMV, GEMV_DOT, GEMV_MATRIX, TILE_FMA, TILE_MATRIX, HipPlan
from q4jit.hip.names import RESERVED, VALUE
from q4jit.hip.render import render
from q4jit.hip.templates import environment, words
from q4jit.hip.values import literal
from q4jit.pipeline import fetch
from q4jit.plan.options import PlanOptions
from tests.support.hip import hip_plan, run_on_host
from tests.support.hip_cases import RECORDED, Case, Generic
from tests.support.kernels import random_x, weight


def norm_plan(m: int, **plan_options: Any) -> HipPlan:
    def norm(x: Any, gain: Any, w: Any) -> Any:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain @ w

    args = [random_x(m, 64), random_x(64), weight("Q4_1", 64, 48).tensor]
    return hip_plan(norm, "hip:gfx1100", args, PlanOptions(**plan_options))


@pytest.mark.parametrize("m", [1, 3, 20])
def test_every_line_says_which_template_it_comes_from(m: int) -> None:
    plan = norm_plan(m)
    for kernel in plan.kernels:
        source = render(plan, kernel)
        assert source.origins is not None
        origins = source.origins()
        for number, line in enumerate(source.text.splitlines(), 1):
            if not line.strip() or number not in origins:
                continue
            template, _, place = origins[number].partition(":")
            written = environment().loader.get_source(environment(), template)[0]  # type: ignore[union-attr]  # there is one
            literal = written.split("\n")[int(place) - 1]
            # the template's line up to its first expression is in the text unchanged
            code = re.sub(r"^\s*(\{%.*?%\})*", "", literal)
            assert re.split(r"\{[{%]", code)[0].strip()[:20] in line, (line, literal)
        ends = [n for n, text in enumerate(source.text.splitlines(), 1) if text.endswith(";")]
        assert len([n for n in ends if n in origins]) > 0.9 * len(ends)


def test_a_compile_error_names_the_template() -> None:
    plan = norm_plan(1, schedule=GEMV)
    source = render(plan, plan.kernels[-1])
    broken = source.text.replace("const int lane =", "const int lane = =", 1)
    assert broken != source.text
    source = type(source)(source.symbol, source.target, broken, source.suffix, source.origins)
    with pytest.raises(CompileError, match=r"<- kernel/gemv\.hip\.j2:\d+") as found:
        fetch(find_compiler(source.target), source)
    assert found.value.origins


def test_an_undefined_name_in_a_template_is_an_error() -> None:
    template = environment().from_string("constexpr int K = {{ k_that_nobody_gives }};")
    with pytest.raises(jinja2.UndefinedError, match="k_that_nobody_gives"):
        template.render()


# --- names that users choose -------------------------------------------------------------------


def identifiers_of_templates() -> list[str]:
    """Return every name in the templates that Python accepts, and some that texts make."""
    names = sorted(words().names) + "sum1 x_element output0 temp0 int new template".split()
    return [n for n in dict.fromkeys(names) if not keyword.iskeyword(n) and n not in {"x", "w"}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0f"),
        (-0.0, "-0.0f"),
        (-1.0, "-1.0f"),
        (0.1, "0.1f"),
        (0.05, "0.05f"),
        (0.00021219444, "0.00021219444f"),
        (1e-4, "1e-04f"),
        (1e-45, "1e-45f"),
        (999999.9, "999999.9f"),
        (1e6, "1e+06f"),
        (12582912.0, "1.2582912e+07f"),
        (3.4028235e38, "3.4028235e+38f"),
        (float("-inf"), "as_f32(0xff800000u)"),
    ],
)
def test_a_number_is_written_alike_by_every_numpy(value: float, text: str) -> None:
    with np.printoptions(legacy="1.13", precision=2, sign="+"):  # as other releases print
        assert literal(value) == text
    assert text.startswith("as_f32") or np.float32(text[:-1]) == np.float32(value)


def test_templates_use_no_name_of_a_value() -> None:
    assert len(words().names) > 300
    assert not [name for name in words().names if VALUE.fullmatch(name)]


def test_a_weight_called_w_keeps_its_name() -> None:
    assert {"_sums", "_ahead"} <= words().after_product
    assert {"exact_", "load_"} <= words().before_product
    assert not [name for name in words().names if name.startswith("w_") or name.endswith("_w")]


@pytest.mark.parametrize("m", [1, 20])
def test_no_argument_hides_a_name_of_the_text(m: int) -> None:
    """Check arguments with the names of constants, locals, types and macros of the text."""
    words, per_function = identifiers_of_templates(), 100
    tensor = weight("Q4_0", 64, 37).tensor
    x = random_x(m, 64)
    for first in range(0, len(words), per_function):
        names = words[first : first + per_function]
        values = np.random.default_rng(first).uniform(0.5, 1.5, len(names)).tolist()
        args = [x, tensor, *values]

        def function(x: Any, w: Any, *scales: Any) -> Any:
            return x @ w * sum(scales)

        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # inspect reads it
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in ("x", "w", *names)]
        )
        (y,) = run_on_host(hip_plan(function, "hip:gfx1100", args), args)
        exact = x.astype(np.float64) @ tensor.dequantize().astype(np.float64) * sum(values)
        assert np.abs(y - exact).max() < 1e-5 * np.abs(exact).max()


def products_of(names: list[str], m: int = 1, **plan_options: Any) -> tuple[HipPlan, list[Any]]:
    """Return the plan of the sum of x's products with weights of these names."""
    args = [random_x(m, 64), *(weight("Q4_0", 64, 48).tensor for _ in names)]

    def function(x: Any, *weights: Any) -> Any:
        return sum(x @ w for w in weights)

    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # inspect reads it
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in ("x0", *names)]
    )
    return hip_plan(function, "hip:gfx1100", args, PlanOptions(**plan_options)), args


@pytest.mark.parametrize(
    "names",
    [
        ["x", "sums", "row", "column", "lane", "part", "at", "exact_w"],
        ["w", "w_sums", "w_ahead", "load_w", "x_scales", "c", "i", "a"],
        ["new", "m", "_w", "int", "W", "staged", "w_product", "sum1"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("schedule", [GEMV, GEMV_MATRIX, GEMV_DOT, TILE_FMA, TILE_MATRIX])
def test_no_weight_hides_a_name_of_the_text(names: list[str], schedule: str) -> None:
    precision = "i8" if schedule == GEMV_DOT else "f32"
    plan, args = products_of(names, schedule=schedule, precision=precision)
    (y,) = run_on_host(plan, args)
    exact = sum(args[0].astype(np.float64) @ w.dequantize().astype(np.float64) for w in args[1:])
    assert np.abs(y - exact).max() < 2e-2 * np.abs(exact).max()


def test_values_are_named_after_arguments_and_operations() -> None:
    def function(x: Any, gate: Any, up: Any, bias: Any) -> Any:
        g = x @ gate + bias
        return g / (1 + np.exp(-g)) * (x @ up)

    tensor = weight("Q4_0", 64, 48).tensor
    args = [random_x(1, 64), tensor, tensor, random_x(48)]
    plan = hip_plan(function, "hip:gfx1100", args)
    text = render(plan, plan.kernels[0]).text
    assert "//   gate_product = x_value @ gate" in text
    assert "float gate_product, float up_product" in text
    assert "const float sum1 = gate_product + bias_element;" in text
    assert "const float quotient1 = sum1 / sum2;" in text


def test_slices_of_a_weight_are_named_after_their_first_columns() -> None:
    def function(x: Any, qkv: Any) -> Any:
        y = x @ qkv
        return y[..., :16] * y[..., 16:32]

    args = [random_x(1, 64), weight("Q4_0", 64, 48).tensor]
    plan = hip_plan(function, "hip:gfx1100", args)
    text = render(plan, plan.kernels[0]).text
    assert "float qkv_0_product, float qkv_16_product" in text


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100", "gfx1201", "sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", RECORDED, ids=lambda kernel: kernel.name)
def test_no_argument_is_a_macro(kernel: Case | Generic, arch: str) -> None:
    """Check that a platform's macros, unseen on the host, are reserved or undefined in time."""
    for source in kernel.sources(arch):
        code, _, kernel_itself = source.text.partition("KERNEL(BLOCK_SIZE")
        assert kernel_itself
        left = set[str]()
        for directive, name in re.findall(r"#(define|undef) (\w+)", code):
            (left.add if directive == "define" else left.discard)(name)
        assert left, "those of the prelude"
        assert left <= RESERVED, source.symbol


@pytest.mark.parametrize("kernel", RECORDED, ids=lambda kernel: kernel.name)
def test_kernels_that_overlap_touch_weights_alone_before_they_wait(kernel: Case | Generic) -> None:
    for source in kernel.sources("sm_90"):
        if isinstance(kernel, Generic):  # other programs launch it in their own way
            assert "await_kernels_before" not in source.text
            continue
        before, wait, after = source.text.partition("    await_kernels_before(a);\n")
        assert wait, source.symbol
        assert "await_kernels_before(a);" not in after
        _, begin, early = before.partition("DEVICE void compute(Arguments a) {")
        assert begin
        assert not re.search(r"\b(load_share|x_values?|row_values)\(", early), source.symbol
        weights = set(re.findall(r"const u8\* (\w+);", before))
        assert set(re.findall(r"\ba\.(\w+)", early)) <= weights | {"m"}, source.symbol
        pointers = set(re.findall(r"^    (?:const )?\w+\* (\w+);", before, re.MULTILINE))
        known = set(re.findall(r"a\.(\w+) = known_from_here", before))
        assert known == pointers - weights, source.symbol
