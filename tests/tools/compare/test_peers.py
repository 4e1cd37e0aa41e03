"""Products of other libraries are right; libraries that are not installed are skipped."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4jit.floats import FLOAT_BYTES, FLOAT_NAMES, FloatType
from q4jit.precision import BOUNDS
from q4jit.targets import find_target
from q4jit.tools.compare import torch_products
from q4jit.tools.compare.arena import AbsentError
from q4jit.tools.compare.contest import contest
from q4jit.tools.compare.cpu_peers import CpuPeers
from q4jit.tools.compare.ggml import Ggml
from q4jit.tools.compare.torch_products import Quants
from q4jit.tools.compare.work import WeightShape
from q4jit.weights.reference import random_weight
from tests.support.fake_arena import K, N


@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0", "F16"])
# 37: not a multiple of the columns that ggml packs; 90 MB: more weights than its default graph
@pytest.mark.parametrize(("n", "total_bytes"), [(64, 200_000), (37, 200_000), (64, 90_000_000)])
def test_ggmls_products_are_right(fmt: str, n: int, total_bytes: int) -> None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama_cpp is not installed; no test installs a peer")
    library = Ggml(Path(spec.origin).parent / "lib")
    work = WeightShape(fmt, 512, n, (5,), total_bytes).product(5)
    weights = [w for (w,) in work.copies]
    with library.product(work.x, weights, 2 * len(weights), 1) as product:
        product.poison()
        assert work.error([product.result()]) is None
        product.compute()
        error = work.error([product.result()])
    assert error is not None
    assert error < BOUNDS["i8"]


@pytest.mark.torch
@pytest.mark.parametrize("dtype", FLOAT_BYTES)
@pytest.mark.parametrize("make", [torch_products.dense, torch_products.dequantise])
def test_products_of_pytorch_are_right(torch: Any, make: Any, dtype: FloatType) -> None:
    """Runs on PyTorch's CPU; the same calls run on a GPU."""
    work = WeightShape("Q4_0", 256, 64, (5,), 0, dtype).product(5)
    calls: Sequence[Callable[[], Any]] = make(torch, "cpu", work, 200_000)
    assert len(calls) > 2
    computed_in = "f16" if make is torch_products.dense and dtype == "f32" else dtype
    for call in calls:
        y = call()
        assert str(y.dtype) == f"torch.{FLOAT_NAMES[computed_in]}"
        error = torch_products.tensor_error(work, y)
        assert error is not None
        assert error < {"f32": 2e-6, "f16": 5e-4, "bf16": 4e-3}[computed_in]


@pytest.mark.torch
@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("dtype", FLOAT_BYTES)
def test_pytorchs_product_with_4_bit_weights_is_right(dtype: FloatType) -> None:
    entrant = CpuPeers(1, find_target("cpu"), None, 0).makers()["torch int4"]()
    work = WeightShape("Q4_0", 256, 64, (5,), 0, dtype).product(5)
    (outcome,) = contest([(entrant, work, BOUNDS["i8"])], 1)
    assert outcome.message == ""
    assert outcome.note == ("x in bf16" if dtype == "f32" else "")
    assert outcome.error is not None
    assert outcome.error < (5e-4 if dtype == "f16" else 4e-3)


def test_quants_agree_with_dequantize() -> None:
    w = random_weight("Q4_0", K, N)
    quants = Quants.of(w)
    values = (quants.q.astype(np.float32) - 8) * np.repeat(quants.d.astype(np.float32), 32, axis=1)
    assert np.array_equal(values, w.dequantize().T)
    with pytest.raises(AbsentError, match="expected Q4_0, got Q8_0"):
        Quants.of(random_weight("Q8_0", K, N))


def test_ggml_lists_the_features_it_was_built_without() -> None:
    library = Ggml.__new__(Ggml)
    library.__dict__ |= {"ggml_cpu_has_avx2": lambda: 1, "ggml_cpu_has_avx512_vnni": lambda: 0}
    assert library.missing({"avx2", "avx512vnni", "sse2"}) == ["avx512vnni"]
