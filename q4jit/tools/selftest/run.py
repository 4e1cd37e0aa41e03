"""Run cases and checks one after the other; a failure does not stop the next one."""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from q4jit.hip.harness import Bench, Built
from q4jit.progress import progress
from q4jit.tools.selftest.cases import Case, cases
from q4jit.tools.selftest.checks import Check, checks
from q4jit.tools.selftest.findings import CaseOutcome, Findings, attempt, error_text
from q4jit.tools.selftest.halves import half_cases, missing_types
from q4jit.tools.selftest.measures import Floats, WrongResultsError
from q4jit.tools.selftest.streams import NotRunError
from q4jit.tools.selftest.timing import time_products
from q4jit.tools.selftest.transposed import transposed_cases


def run_all(bench: Bench, quick: bool, findings: Findings) -> None:
    """Run every case and check, then time products; add each result to `findings` at once."""
    selected = [*cases(bench.target, quick), *half_cases(bench.target, quick)]
    selected += transposed_cases(quick)
    for outcome in outcomes(bench, selected):
        findings.cases.append(outcome)
    findings.cases += missing_types()
    for check in progress(checks(quick), "checking"):
        findings.cases.append(outcome_of(bench, check))
    time_products(bench, quick, findings)


def outcomes(bench: Bench, selected: Sequence[Case]) -> Iterator[CaseOutcome]:
    """Yield the outcome of each case in order, while all kernels compile in the background."""
    pairs = []
    for case in progress(selected, "planning"):
        build = functools.partial(bench.build, case.function, case.args, case.plan_options)
        pairs.append((case, attempt(build)))
    for case, built in progress(pairs, "running"):
        outcome = attempt(functools.partial(_run_case, bench, case, built))
        yield failed(case, outcome) if isinstance(outcome, Exception) else outcome


def _run_case(bench: Bench, case: Case, built: Built | Exception) -> CaseOutcome:
    if isinstance(built, Exception):
        raise built
    return judge(case, bench.run(built, case.args))


def failed(case: Case, error: Exception) -> CaseOutcome:
    """Return the outcome of a case that raised an error."""
    return CaseOutcome(str(case), case.group, case.rows, None, case.bound, False, error_text(error))


def outcome_of(bench: Bench, check: Check) -> CaseOutcome:
    """Run a check and return its outcome."""
    outcome = functools.partial(CaseOutcome, check.name, check.group, check.m, bound=check.bound)
    error = attempt(lambda: check.measure(bench))
    if isinstance(error, NotRunError):
        return outcome(error=None, passed=None, message=f"not run: {error}")
    if isinstance(error, Exception):
        return outcome(error=None, passed=False, message=error_text(error))
    if not math.isfinite(error):
        return outcome(error=None, passed=False, message="results contain NaN or Inf")
    passed = error <= check.bound
    message = "" if passed else _excess(error, check.bound)
    return outcome(error=error, passed=passed, message=message)


def _excess(error: float, bound: float) -> str:
    return f"error {error:.2e} exceeds the bound {bound:.0e}"


def judge(case: Case, results: Sequence[Floats]) -> CaseOutcome:
    """Return the outcome of a case: its results must be finite and within the bound."""
    total = sum(result.size for result in results)
    missing = total - sum(int(np.isfinite(result).sum()) for result in results)
    if missing and case.must_be_finite:
        verb = "is" if missing == 1 else "are"
        message = f"{missing:,} of {total:,} results {verb} NaN or Inf (not written, or wrong)"
        return CaseOutcome(str(case), case.group, case.rows, None, case.bound, False, message)
    try:
        error = case.measure(case.args, results)
    except WrongResultsError as wrong:
        return CaseOutcome(str(case), case.group, case.rows, None, case.bound, False, str(wrong))
    passed = error <= case.bound
    message = "" if passed else _excess(error, case.bound)
    return CaseOutcome(str(case), case.group, case.rows, error, case.bound, passed, message)
