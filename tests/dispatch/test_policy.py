"""The policy: where a call runs, with fake devices and rates."""

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import pytest

from q4jit import ArgumentError, DeviceError, TargetError, quantize, specialize
from q4jit.arrays.views import DeviceView
from q4jit.dispatch import policy
from q4jit.dispatch.policy import CallCost, Place, choose_place
from q4jit.runtime.driver import Device

X = np.zeros((1, 64), np.float32)


def device(index: int = 0, arch: str = "gfx1100", **more: Any) -> Device:
    facts: dict[str, Any] = {
        "platform": "amd",
        "index": index,
        "name": "made up",
        "arch": arch,
        "id": f"0000:0{index}:00.0",
        "memory_bytes": 1 << 34,
        "compute_units": 96,
        "lds_bytes": 64 << 10,
        "max_block_size": 1024,
        "wave": 32,
        "l2_bytes": 6 << 20,
        "clock_khz": 2_500_000,
        "integrated": False,
    }
    return Device(**facts | more)


def view(where: Device) -> DeviceView:
    shape, f32 = (1, 64), "float32"
    return DeviceView(256, shape, None, f32, where.platform, where.index, False, "", None, None)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """Return the list of fake devices; a GPU call costs 30 µs more than its kernels."""
    devices: list[Device] = []
    monkeypatch.setattr(policy, "find_devices", lambda: tuple(devices))
    monkeypatch.setattr(policy, "find_device", lambda name: _named(devices, name))
    monkeypatch.setattr(policy, "device_of", lambda view: devices[view.device])
    monkeypatch.setattr(policy, "_gpu_rates", lambda device: policy._Rates(1e6, 1e6, 1e4, 30.0))
    monkeypatch.setattr(policy, "_cpu_rates", lambda: policy._Rates(1e4, 1e4))
    return devices


def _named(devices: list[Device], name: str) -> Device:
    which = name.partition(":")[2]
    for index, one in enumerate(devices):
        if which in {"", str(index), one.arch}:
            return one
    raise DeviceError(f"no device {name!r}")


def cost(weight_bytes: int) -> CallCost:
    return CallCost(weight_bytes, 1000, weight_bytes)


def place(target: str | None, *args: Any, weight_bytes: int = 0) -> Place:
    names = [f"arg{i}" for i in range(len(args))]
    return choose_place(target, args, names, lambda: cost(weight_bytes))


def test_without_a_gpu_the_cpu_runs_every_call(devices: list[Device]) -> None:
    chosen = place(None, X, weight_bytes=1 << 30)
    assert chosen.device is None
    assert chosen.target.backend == "cpu"
    assert "on the CPU: no GPU" in chosen.rule


def test_small_work_stays_on_the_cpu_and_large_goes_to_the_gpu(devices: list[Device]) -> None:
    devices.append(device())
    small, large = (place(None, X, weight_bytes=size) for size in (250_000, 400_000))
    assert small.device is None
    assert "on the CPU: too little work for a GPU, about 30 µs on amd device 0" in small.rule
    assert "25 µs on the CPU" in small.rule
    assert large.device == devices[0]
    assert str(large.target) == "hip:gfx1100"
    assert "on amd device 0 (made up, gfx1100): it is faster, about 30 µs on" in large.rule


def test_trivial_work_measures_no_gpu(
    devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(device: Device) -> NoReturn:
        raise AssertionError("a GPU was measured")

    devices.append(device())
    monkeypatch.setattr(policy, "_gpu_rates", measure)
    chosen = place(None, X, weight_bytes=190_000)
    assert chosen.device is None
    assert "on the CPU: too little work for a GPU, about 19.0 µs on the CPU" in chosen.rule
    with pytest.raises(AssertionError, match="was measured"):
        place(None, X, weight_bytes=210_000)


class NoTimeDriver:
    """A driver whose copies take no time, with memory for arrays of `room` bytes at most."""

    room = 1 << 20

    def copy_on_device(self, *_: int) -> None:
        pass

    synchronize = copy_on_device


class FakeArray:
    pointer = 256

    def __init__(self, shape: tuple[int, ...], *_: object) -> None:
        if shape[0] > NoTimeDriver.room:
            raise DeviceError(f"out of memory: {shape[0]}")

    @classmethod
    def from_numpy(cls, array: Any, device: Device) -> "FakeArray":
        return cls(array.shape)

    def to_numpy(self) -> None:
        pass


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[NoTimeDriver]]:
    monkeypatch.setattr(policy, "driver_of", lambda device: NoTimeDriver())
    monkeypatch.setattr(policy, "DeviceArray", FakeArray)
    policy._gpu_rates.cache_clear()
    yield NoTimeDriver
    policy._gpu_rates.cache_clear()


def test_an_unknown_clock_counts_as_1_ghz(no_time: type[NoTimeDriver]) -> None:
    known, unknown = (policy._gpu_rates(device(clock_khz=khz)) for khz in (2_000_000, 0))
    assert known.multiply_adds_per_us == 2 * unknown.multiply_adds_per_us
    assert unknown.multiply_adds_per_us == 96 * 1000 * 128


def test_measuring_takes_1_mib_or_fails(
    no_time: type[NoTimeDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert policy._gpu_rates(device()).copy_bytes_per_us > 0
    monkeypatch.setattr(no_time, "room", 1 << 16)
    with pytest.raises(DeviceError, match="out of memory: 1048576"):
        policy._gpu_rates(device(1))


def test_a_discrete_gpu_comes_before_an_integrated_one(devices: list[Device]) -> None:
    devices += [device(0, "gfx1036", integrated=True, compute_units=200), device(1, "gfx1201")]
    assert place(None, X, weight_bytes=1 << 24).device == devices[1]


def test_each_device_gets_code_for_its_arch(devices: list[Device]) -> None:
    devices += [device(0, "gfx1036", integrated=True), device(1, "gfx1201")]
    assert [str(place(f"hip:{i}", X).target) for i in range(2)] == ["hip:gfx1036", "hip:gfx1201"]
    assert place("hip:gfx1201", X).device == devices[1]


def test_a_gpu_of_an_unsupported_arch_is_named(devices: list[Device]) -> None:
    devices.append(device(0, "gfx803"))
    chosen = place(None, X, weight_bytes=1 << 30)
    assert chosen.device is None
    assert "q4jit has no code for amd device 0 (made up, gfx803)" in chosen.rule
    with pytest.raises(TargetError, match="known archs are gfx906"):
        place("hip:0", X)


def test_arrays_on_a_device_stay_there(devices: list[Device]) -> None:
    devices += [device(0), device(1, "gfx1201")]
    chosen = place(None, view(devices[1]), weight_bytes=1)
    assert chosen.device == devices[1]
    assert "on amd device 1 (made up, gfx1201): the arrays are there" in chosen.rule
    assert place("hip:gfx1201", view(devices[1])).device == devices[1]
    for wrong in ("cpu", "hip:gfx1100", "hip:7"):
        with pytest.raises(
            ArgumentError, match=f"'arg0': expected arrays on target='{wrong}', got one"
        ):
            place(wrong, view(devices[1]))


def test_arrays_in_two_places_are_refused(devices: list[Device]) -> None:
    devices += [device(0), device(1)]
    with pytest.raises(ArgumentError, match="arg0 on amd device 0 and arg1 on amd device 1"):
        place(None, view(devices[0]), view(devices[1]))
    with pytest.raises(ArgumentError, match="arg0 on the host and arg1 on amd device 1"):
        place(None, X, view(devices[1]))


def test_a_named_target_is_used_whatever_the_cost(devices: list[Device]) -> None:
    devices.append(device())
    assert place("cpu", X, weight_bytes=1 << 30).device is None
    assert place("hip", X, weight_bytes=1).device == devices[0]


def test_the_cost_counts_weights_once_and_arrays_per_row() -> None:
    w = quantize(np.ones((64, 32)), "Q4_0")
    for x, r, result_bytes in (("f4", "f4", 4), ("f2", "f4", 4), ("f2", "f2", 2)):
        two = specialize(lambda x, w, r: (x @ w + r) * 2)
        args = np.zeros((3, 64), x), w, np.zeros((3, 32), r)
        two(*args)
        (graph,) = two._specializer.kept.graphs.young.values()
        array_bytes = args[0].nbytes + args[2].nbytes + 3 * 32 * result_bytes
        assert policy.cost_of(graph, 3) == CallCost(w.nbytes, array_bytes, 3 * 64 * 32)


def test_the_cpus_rates_are_measured() -> None:
    rates = policy._cpu_rates()
    assert 1e2 < rates.read_bytes_per_us < 1e7
    assert 1e2 < rates.multiply_adds_per_us < 1e8


def test_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    w = quantize(np.ones((64, 32)), "Q4_0")
    for name in ("hip:7", "cuda:7"):
        asked = specialize(lambda x, w: x @ w, target=name)
        with pytest.raises(DeviceError, match=f"no device '{name}'"):
            asked(X, w)
        assert "nothing is compiled yet" in asked.explain()


def test_kernels_for_a_missing_gpu_can_be_inspected() -> None:
    asked = specialize(lambda x, w: x @ w, target="hip:gfx1100")
    with pytest.raises(DeviceError, match="inspect_source and inspect_asm"):
        asked(X, quantize(np.ones((64, 32)), "Q4_0"))
    assert "hip:gfx1100" in asked.inspect_source()
    assert "amdgcn" in asked.inspect_asm()
