"""Products with chosen experts on a real GPU: every format, PyTorch's tensors, captured graphs."""

from typing import Any

import numpy as np
import pytest

from q4jit import specialize
from q4jit.hip.harness import Bench
from q4jit.plan.options import PlanOptions
from q4jit.precision import BOUNDS
from q4jit.weights.formats import FORMATS
from tests.support.experts import (
    E,
    assert_experts,
    chosen,
    experts,
    moe,
    moe_arguments,
    numbers,
    of_rows,
)

pytestmark = pytest.mark.gpu

K, N = 512, 200


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_with_few_and_many_vectors(bench: Bench, name: str) -> None:
    w = experts(name, K, N)
    for t, dtype in ((1, "int64"), (2, "int32"), (40, "int64"), (700, "int32")):
        x, ids = numbers(t, K), chosen(t, 3).astype(np.dtype(dtype))
        (y,) = bench.run(bench.build(of_rows, (x, w, ids), PlanOptions()), (x, w, ids))
        assert_experts(y, x[:, None], w, ids, BOUNDS["f32"])


@pytest.mark.parametrize(("t", "a"), [(1, 4), (5, 3), (300, 2)])
def test_a_feed_forward(bench: Bench, t: int, a: int) -> None:
    args = moe_arguments(t, a, 256, 384)
    (y,) = bench.run(bench.build(moe, args, PlanOptions()), args)
    wanted = moe(*args)
    assert np.abs(y - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_unknown_experts_give_nan(bench: Bench) -> None:
    w = experts("Q4_0", K, N)
    for t in (4, 30):
        x, ids = numbers(t, K), chosen(t, 1)
        ids[1], ids[2] = -1, E
        (y,) = bench.run(bench.build(of_rows, (x, w, ids), PlanOptions()), (x, w, ids))
        known = (ids >= 0) & (ids < E)
        assert np.isnan(y[~known]).all()
        assert np.isfinite(y[known]).all()


@pytest.mark.parametrize("t", [1, 40])
def test_a_captured_graph_is_replayed_with_other_ids(torch: Any, t: int) -> None:
    x, gate, up, down, ids, s = moe_arguments(t, 3, 256, 384)
    function = specialize(moe)
    tensors = [torch.from_numpy(array).cuda() for array in (x, ids, s)]
    out = torch.empty((t, 256), device="cuda")

    def call() -> None:
        function(tensors[0], gate, up, down, *tensors[1:], out=out)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in range(3):
        other = chosen(t, 3, seed=seed)
        tensors[1].copy_(torch.from_numpy(other))
        graph.replay()
        wanted = moe(x, gate, up, down, other, s)
        assert np.abs(out.cpu().numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
