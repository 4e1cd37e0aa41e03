"""The layout in which the kernels of a device read a weight, so that it is stored once."""

import functools
from typing import Any

import numpy as np
import torch

from q4jit.backends import find_backend
from q4jit.errors import ArgumentError, expected
from q4jit.frontend.specs import Signature, WeightSpec, array_spec, ids_spec
from q4jit.frontend.trace import trace
from q4jit.plan.options import PlanOptions
from q4jit.runtime.devices import find_device, target_of
from q4jit.targets import find_target
from q4jit.weights.layouts import GGUF


def layout_on(device: torch.device, name: str, k: int, n: int, experts: int, lookup: bool) -> str:
    """Return the layout of a weight on a device.

    name: of its block format. experts: 0 for one matrix. lookup: it is a table for `w.rows(ids)`.
    Raises ArgumentError for a device that has no kernels.
    """
    if device.type not in {"cpu", "cuda", "meta"}:  # AMD's GPUs are "cuda" as well
        raise ArgumentError(
            expected("a CPU, or a GPU of CUDA or ROCm", str(device), where="device")
        )
    if lookup or device.type == "meta":
        return GGUF
    return _layout_of_products(device.type, device.index or 0, name, k, n, experts)


@functools.lru_cache(maxsize=1 << 10)
def _layout_of_products(kind: str, index: int, name: str, k: int, n: int, experts: int) -> str:
    weight = WeightSpec(name, k, n, experts=experts)
    if experts:
        signature: Signature = array_spec((2, k)), weight, ids_spec((2,))
        graph = trace(_chosen_product, signature)
    else:
        signature = array_spec((2, k)), weight
        graph = trace(_product, signature)
    gpu = (
        find_device(f"{'hip' if torch.version.hip else 'cuda'}:{index}") if kind == "cuda" else None
    )
    target = find_target("cpu") if gpu is None else target_of(gpu)
    plan = find_backend(target).plan(graph, target, 1, PlanOptions(), gpu)
    ((_, layout),) = plan.weight_layouts()
    return layout


def _product(x: Any, w: Any) -> Any:
    return x @ w


def _chosen_product(x: Any, w: Any, ids: Any) -> Any:
    return np.vecmat(x, w[ids])
