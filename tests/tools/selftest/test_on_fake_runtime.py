"""A self-test on a fake runtime whose kernels do nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import child, fake_gpu


@pytest.fixture(params=["amd", "nvidia"])
def run_on_fake(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Return a function that runs a program whose Bench compiles for the fake runtime."""
    folder = str(fake_gpu.build(tmp_path, request.param))
    prelude = (
        fake_gpu.PRELUDE
        + """
from q4jit.compilers import cache
from q4jit.hip import harness
from q4jit.tools.selftest import checks, timing
from q4jit.tools.selftest.cases import Case, product, product_and_values
from q4jit.tools.selftest.measures import contract_error
from q4jit.tools.selftest.run import outcome_of, outcomes
from q4jit.hip.harness import Bench
from q4jit.weights.reference import random_weight, random_x
from q4jit.errors import CompileError
from q4jit.plan.options import PlanOptions

class Compiler:
    SOURCE_SUFFIX, SUFFIX = ".hip", ".code"
    fingerprint = staticmethod(lambda target: "fake")
    compile_object = staticmethod(lambda text, target: fake.code())

harness.find_compiler = lambda target: Compiler
driver, first, _ = start()
x, w = random_x(3, 256), random_weight("Q4_0", 256, 37)
"""
    )

    def run(program: str) -> str:
        environment = {"FAKE_PLATFORM": request.param, "FAKE_FOLDER": folder, "ROCM_PATH": folder}
        return child.run(program, prelude=prelude, **environment)

    return run


def test_results_that_kernels_do_not_write_are_nan(run_on_fake: Callable[[str], str]) -> None:
    run_on_fake("""
        with Bench(first) as bench:
            for function in (product, product_and_values):
                built = bench.build(function, (x, w), PlanOptions())
                launched = fake["launches"]
                results = bench.run(built, (x, w))
                assert fake["launches"] == launched + len(built.sources)
                assert [r.shape for r in results] == [(3, 37), (256, 37)][: len(results)]
                assert all(np.isnan(result).all() for result in results)
            assert {symbol for _, symbol, _ in bench.compiled()} >= {"q4jit_product"}
    """)


def test_cases_of_half_precision_fail_where_kernels_write_nothing(
    run_on_fake: Callable[[str], str],
) -> None:
    run_on_fake("""
        from q4jit.tools.selftest.halves import half_cases
        with Bench(first) as bench:
            selected = [
                case for case in half_cases(bench.target, quick=True)
                if case.args[0].nbytes < 1 << 19  # half of the fake device's memory
            ]
            assert {str(case.args[0].dtype) for case in selected} == {"float16", "bfloat16"}
            for case, outcome in zip(selected, outcomes(bench, selected), strict=True):
                assert outcome.passed is False, outcome
                wrong = "or number that they" if not case.must_be_finite else "NaN or Inf"
                assert wrong in outcome.message, outcome
    """)


def test_calls_are_timed_while_copies_keep_the_device_busy(
    run_on_fake: Callable[[str], str],
) -> None:
    run_on_fake("""
        with Bench(first) as bench:
            weights = timing._rotation(first, 256, 37)
            assert len(weights) > 2 and len({id(w) for w in weights}) == len(weights)
            bench.copy_us = 1.0
            us = timing._time_us(bench, PlanOptions(schedule="gemv"), 1, weights)
            assert us > 0
            assert bench.copy_bytes() == first.memory_bytes // 8
    """)


def test_checks_of_kernels_that_do_nothing_fail(run_on_fake: Callable[[str], str]) -> None:
    run_on_fake("""
        class Streams:
            replays = 0
            make = staticmethod(lambda: 4096)
            handle = staticmethod(lambda stream: stream)
            def capture(self, stream, action):
                action()
                def replay():
                    Streams.replays += 1
                return replay

        checks.find_streams = lambda device: Streams()
        with Bench(first) as bench:
            results = [outcome_of(bench, check) for check in checks.checks(True)]
            built = bench.build(product, (x, w), PlanOptions())
            (y,) = bench.run_rows(built, (x, w), [slice(1, 3)])
        assert y.shape == (2, 37) and np.isnan(y).all()
        assert [o.message for o in results] == ["results contain NaN or Inf"] * 4, results
        assert Streams.replays == 4
    """)


def test_selected_rows_of_a_result_are_copied(run_on_fake: Callable[[str], str]) -> None:
    run_on_fake("""
        with Bench(first) as bench:
            uploaded = bench.upload((x,), 4096)[0]
            assert uploaded.stream == 4096
            bench.overwrite(uploaded, 2 * x)
            np.testing.assert_array_equal(uploaded.owner.to_numpy(), 2 * x)
            rows = bench._rows(uploaded.owner, slice(1, 3))
            np.testing.assert_array_equal(rows, 2 * x[1:3])
            assert bench.free_bytes() > 0
    """)


def test_a_compiler_error_names_the_template(run_on_fake: Callable[[str], str]) -> None:
    run_on_fake("""
        def refuse(text, target):
            lines = text.splitlines()
            line = 1 + next(i for i, t in enumerate(lines) if "extern" in t)
            raise CompileError("fake", (), f"kernel.hip:{line}: error: no", text)
        Compiler.compile_object = staticmethod(refuse)
        Compiler.fingerprint = staticmethod(lambda target: "not in the cache")
        with Bench(first) as bench:
            case = Case(
                "g", product, (x, w), PlanOptions(), 1.0, contract_error
            )
            (outcome,) = outcomes(bench, [case])
            assert not outcome.passed
            assert "CompileError" in outcome.message
            assert ".j2:" in outcome.message, outcome.message
    """)
