"""Times of products whose weights come from memory, and of a copy within device memory."""

import functools
from collections.abc import Sequence
from typing import Final

from q4jit.hip.harness import Bench, rotated_bytes
from q4jit.plan.options import PlanOptions
from q4jit.progress import progress
from q4jit.runtime.driver import Device
from q4jit.tools.selftest.cases import product, schedules
from q4jit.tools.selftest.findings import Findings, Timing, attempt, error_text
from q4jit.weights.reference import random_weight, random_x, rotated_copies
from q4jit.weights.tensor import QuantizedTensor

_TIMED_SHAPES: Final = ((4096, 4096), (4096, 14336))
_TIMED_ROWS: Final = (1, 8, 64, 512)


def time_products(bench: Bench, quick: bool, findings: Findings) -> None:
    """Add the speed of a copy within device memory and the times of products to `findings`."""
    copy_us = attempt(lambda: bench.copy_us)
    if isinstance(copy_us, Exception):  # the device was lost: timing products would fail too
        findings.copy = {"gb_per_s": None, "message": error_text(copy_us)}
        return
    rate = 2e-3 * bench.copy_bytes() / copy_us
    findings.copy = {"gb_per_s": rate, "bytes": bench.copy_bytes()}
    for k, n in _TIMED_SHAPES[:1] if quick else _TIMED_SHAPES:
        weights = _rotation(bench.device, k, n)
        calls = [(s, p, m) for s, p in schedules(bench.target) for m in _TIMED_ROWS]
        for schedule, precision, m in progress(calls, f"timing [{k}, {n}]"):
            plan_options = PlanOptions(precision, None, schedule)
            us = attempt(functools.partial(_time_us, bench, plan_options, m, weights))
            product_key = (schedule, precision, k, n, m)
            if isinstance(us, Exception):
                findings.timings.append(Timing(*product_key, None, None, None, error_text(us)))
            else:
                speed = weights[0].nbytes / us * 1e-3
                findings.timings.append(Timing(*product_key, us, speed, speed / rate))


def _rotation(device: Device, k: int, n: int) -> list[QuantizedTensor]:
    """Return copies of a weight that together exceed the device's caches."""
    first = random_weight("Q4_0", k, n)
    return [
        QuantizedTensor.from_bytes(first.raw, shape=first.shape, format=first.format)
        for _ in range(rotated_copies(rotated_bytes(device), first.nbytes))
    ]


def _time_us(
    bench: Bench, plan_options: PlanOptions, m: int, weights: Sequence[QuantizedTensor]
) -> float:
    x = random_x(m, weights[0].shape[0])
    built = bench.build(product, (x, weights[0]), plan_options)
    calls = [bench.upload((x, w)) for w in weights[:1]]
    calls += [(calls[0][0], w) for w in weights[1:]]
    (out,) = bench.outputs(built, calls[0])
    launch = bench.bind(built, calls[0])
    for args in calls:
        launch.prepare(args)
    return bench.call_us([functools.partial(launch, args, out) for args in calls])
