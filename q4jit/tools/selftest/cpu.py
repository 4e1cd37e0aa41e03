"""The self-test of the CPU's kernels: its cases run by calls, as a user makes them."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from q4jit import config
from q4jit.backends import find_backend
from q4jit.dispatch.options import Options
from q4jit.dispatcher import Specialized
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.progress import progress
from q4jit.runtime.driver import Device
from q4jit.targets import find_target
from q4jit.tools.provenance import cache_bytes, cpu_name
from q4jit.tools.selftest.cases import (
    EVERY_M,
    Case,
    function_cases,
    looked_up,
    one_sign_cases,
    product,
    product_and_values,
    shape_for,
    unaligned_weight,
)
from q4jit.tools.selftest.findings import CaseOutcome, Findings, attempt
from q4jit.tools.selftest.halves import cpu_half_cases, missing_types
from q4jit.tools.selftest.measures import (
    Floats,
    against_values,
    contract_error,
    lookup_error,
    values_error,
)
from q4jit.tools.selftest.run import failed, judge
from q4jit.tools.selftest.transposed import cpu_transposed_cases
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import INTERLEAVED16, pack
from q4jit.weights.reference import random_weight, random_x
from q4jit.weights.tensor import QuantizedTensor

NOT_TIMED = "the CPU is timed by: q4jit bench --target cpu"


class CpuBench:
    """This machine's CPU, described as a report describes a GPU."""

    def __init__(self) -> None:
        """Find the CPU. Raises TargetError if q4jit does not support it."""
        self.target = find_target("cpu")
        self.fingerprint = find_backend(self.target).compiler(self.target).fingerprint(self.target)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.device = Device(
            platform="cpu",
            index=0,
            name=cpu_name(),
            arch=self.target.arch,
            id="",
            memory_bytes=memory,
            compute_units=config.num_threads(),
            lds_bytes=0,
            max_block_size=1,
            wave=1,
            l2_bytes=cache_bytes(),
            clock_khz=0,
            integrated=True,
        )

    def __enter__(self) -> "CpuBench":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compiled(self) -> list[Any]:
        """Return no kernels: calls compile them, and `explain()` reports on them."""
        return []

    def run(self, case: Case) -> Sequence[Floats]:
        """Return the results of a case, whose arrays are set to NaN before its kernels run."""
        options = Options(target="cpu", precision=case.plan_options.precision)
        call: Any = Specialized(case.function, options)
        shapes = call(*case.args)
        results = shapes if isinstance(shapes, tuple) else (shapes,)
        for result in results:
            result[...] = np.nan
        call(*case.args, out=shapes)
        return results


def run_cpu(bench: CpuBench, quick: bool, findings: Findings) -> None:
    """Run every case of the CPU; add each outcome to `findings` at once."""
    findings.copy = {"gb_per_s": None, "message": NOT_TIMED}
    for case in progress(list(cpu_cases(quick)), "running"):
        findings.cases.append(_outcome(bench, case))
    findings.cases += missing_types()


def _outcome(bench: CpuBench, case: Case) -> CaseOutcome:
    results = attempt(functools.partial(bench.run, case))
    return failed(case, results) if isinstance(results, Exception) else judge(case, results)


def _in_panels(w: QuantizedTensor) -> QuantizedTensor:
    """Return the weight with only the bytes that products read."""
    packed = pack(w.block_format, INTERLEAVED16, w.raw)
    return QuantizedTensor.of_packed(w.block_format, *w.shape, INTERLEAVED16, lambda: packed)


def cpu_cases(quick: bool = False) -> Iterator[Case]:
    """Yield every format and precision with several M, and the other functions and arrays."""
    formats = ("Q4_0",) if quick else tuple(FORMATS)
    for turn, name in enumerate(formats):
        w = random_weight(name, *shape_for(name, turn))
        for precision, bound in BOUNDS.items():
            plan_options = PlanOptions(precision)
            for m in EVERY_M:
                args = (random_x(m, w.shape[0]), w)
                yield Case(
                    f"product {precision}", product, args, plan_options, bound, contract_error
                )
        args = (random_x(3, w.shape[0]), w)
        both, plan_options = product_and_values, PlanOptions()
        yield Case("product and values", both, args, plan_options, BOUNDS["f32"], against_values)
        yield Case("dequantize", both, args, plan_options, 0.0, values_error)
        ids = np.random.default_rng(1).integers(0, w.shape[1], 17)
        yield Case("lookup", looked_up, (ids, w), plan_options, 0.0, lookup_error)
        args = (ids, _in_panels(w))
        yield Case("lookup in panels", looked_up, args, plan_options, 0.0, lookup_error)
    yield from one_sign_cases((name, m) for name in formats for m in (1, 17))
    yield from function_cases()
    yield from cpu_half_cases(quick)
    yield from cpu_transposed_cases(quick)
    w = unaligned_weight()
    for m in (1, 17):
        args = (random_x(m, w.shape[0]), w)
        group = "unaligned weights"
        yield Case(group, product, args, PlanOptions(), BOUNDS["f32"], contract_error)
