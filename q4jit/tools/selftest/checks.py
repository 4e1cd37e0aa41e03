"""What one call does not show: streams, graphs, a result of more than 2³¹ elements."""

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

_LARGE: Final = (65600, 32, 32768)  # M, K, N: the result's elements need more than 31 bits
_STREAM_CALLS: Final = 20


@dataclass(frozen=True)
class Check:
    """Something that one call does not show; `measure` gives its error, at most `bound`."""

    name: str
    group: str
    m: int
    bound: float
    measure: Callable[[Bench], float]


def checks(quick: bool = False) -> list[Check]:
    """Graphs and streams without scratch memory and with, and a result above 2³¹ elements."""
    found = []
    for m in (1, 64):
        replay, streams = functools.partial(replay_error, m=m), functools.partial(stream_error, m=m)
        about = f"product, M = {m}, Q4_0 {list(SHAPES[0])}"
        found.append(Check(f"graph, {about}", "graph replay", m, BOUNDS["f32"], replay))
        found.append(Check(f"two streams, {about}", "two streams", m, 0.0, streams))
    if not quick:
        m, k, n = _LARGE
        name = f"product, M = {m}, Q4_0 {[k, n]}"
        found.append(Check(name, "M·N above 2³¹", m, BOUNDS["f32"], large_error))
    return found


def replay_error(bench: Bench, m: int) -> float:
    """The error of a graph's replays with activations that changed after its capture."""
    streams = find_streams(bench.device)
    stream = streams.make()
    x, w = random_x(m, SHAPES[0][0]), random_weight("Q4_0", *SHAPES[0])
    built = bench.build(product, (x, w), PlanOptions())
    args = bench.upload((x, w), streams.handle(stream))
    (out,) = bench.outputs(built, args)
    launch = bench.bind(built, args)
    launch(args, out)  # uploads the weight, which cannot be part of a graph
    replay = streams.capture(stream, lambda: launch(args, out))
    worst = 0.0
    for scale in (-1, 3):
        changed = scale * x + np.float32(1)
        bench.overwrite(args[0], changed)
        replay()
        worst = larger(worst, contract_error((changed, w), [out.to_numpy()]))
    return worst


def stream_error(bench: Bench, m: int) -> float:
    """The largest difference of results of two streams at a time from what each gives alone."""
    streams = find_streams(bench.device)
    made = [streams.make() for _ in range(2)]
    x, w = random_x(m, SHAPES[0][0]), random_weight("Q4_0", *SHAPES[0])
    built = bench.build(product, (x, w), PlanOptions())
    calls = [
        bench.upload((x * sign, w), streams.handle(s))
        for sign, s in zip((1, -1), made, strict=True)
    ]
    launch = bench.bind(built, calls[0])
    outs = [[bench.outputs(built, args)[0] for args in calls] for _ in range(_STREAM_CALLS)]
    alone = []
    for args in calls:
        (out,) = bench.outputs(built, args)
        launch(args, out)
        alone.append(out.to_numpy())
    for pair in outs:
        for args, out in zip(calls, pair, strict=True):
            launch(args, out)
    worst = 0.0
    for pair in outs:
        for out, wanted in zip(pair, alone, strict=True):
            worst = larger(worst, difference(out.to_numpy(), wanted))
    return worst


def large_error(bench: Bench) -> float:
    """The error of some rows of a result of more than 2³¹ elements, the last among them."""
    m, k, n = _LARGE
    needed, free = 5 * m * n, bench.free_bytes()  # 4 bytes each, and some room
    if free < needed:
        raise NotRunError(f"needs {needed:,} bytes of the device's memory, free are {free:,}")
    x, w = random_x(m, k), random_weight("Q4_0", k, n)
    border = (1 << 31) // n
    bands = [slice(0, 3), slice(border - 2, border + 2), slice(m - 3, m)]
    found = bench.run_rows(bench.build(product, (x, w), PlanOptions()), (x, w), bands)
    pairs = zip(bands, found, strict=True)
    return functools.reduce(larger, (contract_error((x[b], w), [y]) for b, y in pairs))
