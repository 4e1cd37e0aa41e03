"""The GPU of this machine, for tests that are marked `gpu`."""

from collections.abc import Iterator
from typing import Any

import pytest

from q4jit.hip.harness import Bench
from q4jit.runtime import devices
from q4jit.runtime.driver import Device


@pytest.fixture(scope="module")
def device() -> Device:
    usable = devices.find_devices()
    if not usable:
        pytest.skip(devices.why_none())
    return usable[0]


@pytest.fixture(scope="module")
def bench(device: Device) -> Iterator[Bench]:
    with Bench(device) as made:
        yield made


@pytest.fixture(scope="module")
def torch(device: Device) -> Any:
    module: Any = pytest.importorskip("torch", reason="torch is not installed")
    if not module.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    return module
