"""Checks beyond single calls: streams, graphs, and a result of more than 2³¹ elements."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from q4jit.hip.harness import Bench
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.tools.selftest.cases import SHAPES, product
from q4jit.tools.selftest.measures import contract_error, difference, larger
from q4jit.tools.selftest.streams import NotRunError, find_streams
from q4jit.weights.reference import random_weight, random_x

_LARGE: Final = (65600, 32, 32768)  # M, K, N: indices of the result need more than 31 bits
_STREAM_CALLS: Final = 20


@dataclass(frozen=True)
class Check:
    """A check beyond a single call.

    Attributes:
        name: what is computed.
        group: the line of the report's table that counts the check.
        m: the number of rows M.
        bound: the largest accepted error.
        measure: runs the check and returns its error.
    """

    name: str
    group: str
    m: int
    bound: float
    measure: Callable[[Bench], float]


def checks(quick: bool = False) -> list[Check]:
    """Return the checks: graphs and streams with and without scratch memory, and a large result."""
    selected = []
    for m in (1, 64):
        replay, streams = functools.partial(replay_error, m=m), functools.partial(stream_error, m=m)
        about = f"product, M = {m}, Q4_0 {list(SHAPES[0])}"
        selected.append(Check(f"graph, {about}", "graph replay", m, BOUNDS["f32"], replay))
        selected.append(Check(f"two streams, {about}", "two streams", m, 0.0, streams))
    if not quick:
        m, k, n = _LARGE
        name = f"product, M = {m}, Q4_0 {[k, n]}"
        selected.append(Check(name, "M·N above 2³¹", m, BOUNDS["f32"], large_error))
    return selected


def replay_error(bench: Bench, m: int) -> float:
    """Return the error of a graph's replays with x changed after the capture."""
    streams = find_streams(bench.device)
    stream = streams.make()
    x, w = random_x(m, SHAPES[0][0]), random_weight("Q4_0", *SHAPES[0])
    built = bench.build(product, (x, w), PlanOptions())
    args = bench.upload((x, w), streams.handle(stream))
    (out,) = bench.outputs(built, args)
    launch = bench.bind(built, args)
    launch(args, out)  # uploads the weight: a graph cannot capture that
    replay = streams.capture(stream, lambda: launch(args, out))
    worst = 0.0
    for scale in (-1, 3):
        changed = scale * x + np.float32(1)
        bench.overwrite(args[0], changed)
        replay()
        worst = larger(worst, contract_error((changed, w), [out.to_numpy()]))
    return worst


def stream_error(bench: Bench, m: int) -> float:
    """Return the largest difference between results of two concurrent streams and of one."""
    streams = find_streams(bench.device)
    two_streams = [streams.make() for _ in range(2)]
    x, w = random_x(m, SHAPES[0][0]), random_weight("Q4_0", *SHAPES[0])
    built = bench.build(product, (x, w), PlanOptions())
    calls = [
        bench.upload((x * sign, w), streams.handle(s))
        for sign, s in zip((1, -1), two_streams, strict=True)
    ]
    launch = bench.bind(built, calls[0])
    outs = [[bench.outputs(built, args)[0] for args in calls] for _ in range(_STREAM_CALLS)]
    separate = []
    for args in calls:
        (out,) = bench.outputs(built, args)
        launch(args, out)
        separate.append(out.to_numpy())
    for pair in outs:
        for args, out in zip(calls, pair, strict=True):
            launch(args, out)
    worst = 0.0
    for pair in outs:
        for out, wanted in zip(pair, separate, strict=True):
            worst = larger(worst, difference(out.to_numpy(), wanted))
    return worst


def large_error(bench: Bench) -> float:
    """Return the error of some rows, including the last, of a result above 2³¹ elements."""
    m, k, n = _LARGE
    needed, free = 5 * m * n, bench.free_bytes()  # 4 bytes per element and a reserve
    if free < needed:
        raise NotRunError(f"needs {needed:,} bytes of device memory, {free:,} are free")
    x, w = random_x(m, k), random_weight("Q4_0", k, n)
    border = (1 << 31) // n
    bands = [slice(0, 3), slice(border - 2, border + 2), slice(m - 3, m)]
    results = bench.run_rows(bench.build(product, (x, w), PlanOptions()), (x, w), bands)
    pairs = zip(bands, results, strict=True)
    return functools.reduce(larger, (contract_error((x[b], w), [y]) for b, y in pairs))
