"""Arrays on a device: views of any library's arrays, and q4jit's own in other libraries."""

import gc
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from q4jit.arrays import dlpack
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.libraries import as_device_array, current_stream, empty_like_kind
from q4jit.arrays.views import (
    DeviceView,
    common_device,
    require_contiguous,
    require_float,
)
from q4jit.dispatcher import specialize
from q4jit.errors import ArgumentError, DeviceError, TraceError
from q4jit.runtime import devices
from q4jit.runtime.driver import Device
from tests.support import fake_gpu
from tests.support.fake_gpu import PRELUDE, Run

F32 = np.dtype(np.float32)


IMPORTS = """
from q4jit.arrays import dlpack
from q4jit.arrays.device_array import DeviceArray
from q4jit.arrays.libraries import as_device_array, current_stream, empty_like_kind
from q4jit.arrays.torch_tensors import tensor_facts
from q4jit.arrays.views import DeviceView, common_device, device_of
from q4jit.arrays.views import require_contiguous, require_float
"""


@pytest.fixture(params=["amd", "nvidia"], scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a program on a fake platform, and checks that it succeeds."""
    prelude = PRELUDE + IMPORTS
    return fake_gpu.runner(tmp_path_factory.mktemp("fake"), request.param, prelude=prelude)


# --- q4jit's own ----------------------------------------------------------------------------------


def test_own_array_keeps_values_and_is_freed(run: Run) -> None:
    run("""
        _, first, second = start()
        values = np.arange(12, dtype=np.float32).reshape(3, 4)
        for source in (values, values.T, values[:, ::2], values[:0], np.float32(7).reshape(())):
            array = DeviceArray.from_numpy(source, second)
            assert (array.shape, array.dtype) == (source.shape, source.dtype)
            assert array.nbytes == source.nbytes
            np.testing.assert_array_equal(array.to_numpy(), source)
            view = as_device_array(array)
            assert view.shape == source.shape and view.strides is None and view.owner is array
            assert (view.platform, view.device) == (platform, 1) and device_of(view) == second
            del array, view
        assert fake.allocations() == 0
    """)


def test_own_array_is_not_copied_with_its_address(run: Run) -> None:
    run("""
        import copy, pickle
        array = DeviceArray.from_numpy(np.ones(3, np.float32), start()[1])
        for call in (pickle.dumps, copy.copy, copy.deepcopy):
            try:
                call(array)
            except TypeError as error:
                assert "cannot be pickled or copied; use a.to_numpy()" in str(error), error
            else:
                raise AssertionError(call)
    """)


def test_own_array_left_at_exit_is_silent(run: Run) -> None:
    program = """
        driver, first, _ = start()
        kept = DeviceArray((4,), first)
        driver.free = lambda *place: print("freed at exit, where the driver may be gone", *place)
        kept.itself = kept
        capsule = kept.__dlpack__()
        sys.kept = kept, capsule
    """
    assert run(program) == ""


def test_own_array_through_the_array_interface(run: Run) -> None:
    run("""
        _, first, second = start()
        array = DeviceArray.from_numpy(np.ones((2, 3), np.float32), second)
        class Foreign:
            __cuda_array_interface__ = array.__cuda_array_interface__
        assert Foreign.__cuda_array_interface__["version"] == 3
        view = as_device_array(foreign := Foreign())
        assert view == array.view()._replace(owner=foreign, stream=0)
        assert current_stream(view) == 0  # 1 in the interface
        new = empty_like_kind(view, (5,), "f32")
        assert type(new) is DeviceArray and new.device == second and new.shape == (5,)

        entries = dict(array.__cuda_array_interface__, stream=None, version=2)
        entries["data"] = (array.pointer, True)
        Foreign.__cuda_array_interface__ = dict(entries, strides=(4, 8))
        view = as_device_array(Foreign())
        assert view.strides == (1, 2) and view.readonly and current_stream(view) == 0
        Foreign.__cuda_array_interface__ = dict(entries, strides=(12, 4))
        assert as_device_array(Foreign()).strides is None
        Foreign.__cuda_array_interface__ = dict(entries, shape=(1, 6), strides=(999, 4))
        assert as_device_array(Foreign()).strides is None
        host = np.ones(3, np.float32)
        Foreign.__cuda_array_interface__ = dict(entries, data=(on_host(host), False))
        with refused(DeviceError, hex(on_host(host)), "no GPU of this machine holds"):
            as_device_array(Foreign())
    """)


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 2)])
def test_own_array_through_dlpack(run: Run, version: tuple[int, int] | None) -> None:
    run(f"""
        version = {version}
        _, first, second = start()
        array = DeviceArray.from_numpy(np.ones((2, 3), np.float32), second)
        class Foreign:
            def __dlpack_device__(self):
                return array.__dlpack_device__()
            def __dlpack__(self, *, max_version=None):
                return array.__dlpack__(max_version=version)
        named = "dltensor_versioned" if (version or (0, 0)) >= (1, 0) else "dltensor"
        assert f'"{{named}}"' in repr(array.__dlpack__(max_version=version))
        assert dlpack._lent == {{}}, "an unused capsule frees its tensor"
        view = as_device_array(Foreign())
        assert view._replace(owner=0, stream=0) == array.view()._replace(owner=0)
        assert len(dlpack._lent) == 1 and current_stream(view) == 0
        pointer = array.pointer
        del array
        gc.collect()
        assert fake.allocations() == 1, "the capsule's consumer keeps it alive"
        del view
        assert dlpack._lent == {{}} and fake.allocations() == 0
    """)


def test_own_array_is_exported_as_the_standard_requires(run: Run) -> None:
    run("""
        driver, first, _ = start()
        array = DeviceArray((2,), first, stream=7)
        number = {"amd": 10, "nvidia": 2}[platform]
        assert array.__dlpack_device__() == (number, 0)
        waits = []
        driver.synchronize = lambda *place: waits.append(place)
        for stream in (-1, 7, None, 1, 9):
            array.__dlpack__(stream=stream, dl_device=(number, 0), copy=False)
        assert waits == [(0, 7)] * 3
        for wrong in ({"copy": True}, {"dl_device": (1, 0)}, {"dl_device": (number, 1)}):
            with refused(BufferError, "in place"):
                array.__dlpack__(**wrong)
    """)


# --- DLPack from others ---------------------------------------------------------------------------


@dataclass
class Producer:
    """NumPy's memory, exported as if it were a GPU's.

    Attributes:
        log: has "released" when the consumer has released the memory.
    """

    array: np.ndarray[Any, Any]
    device: tuple[int, int] = (2, 3)
    old: bool = False
    change: Callable[[Any], None] = lambda managed: None
    log: list[str] = field(default_factory=list)
    taken: bool = False

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> object:
        if self.old and options:
            raise TypeError("unexpected keyword argument")
        itemsize = self.array.itemsize
        tensor = dlpack.Tensor(
            self.array.ctypes.data,
            self.array.shape,
            tuple(stride // itemsize for stride in self.array.strides),
            self.array.dtype.name,
            self.device[1],
            not self.array.flags.writeable,
            _Owner(self.log),
        )
        capsule = dlpack.produce(tensor, self.device[0], versioned=not self.old)
        (managed, *_) = next(reversed(dlpack._lent.values()))
        self.change(managed)
        if self.taken:
            dlpack.consume(_Once(capsule))
        return capsule


class _Owner:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def __del__(self) -> None:
        self._log.append("released")


@dataclass
class _Once:
    capsule: object

    def __dlpack__(self, **_: Any) -> object:
        return self.capsule


def view_of(producer: object) -> DeviceView:
    view = as_device_array(producer, "x")
    assert view is not None
    return view


@pytest.mark.parametrize("old", [False, True])
def test_dlpack_is_read_in_place(old: bool) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    producer = Producer(array[1:, ::2], old=old)
    view = view_of(producer)
    assert view.pointer == array[1:].ctypes.data
    assert (view.shape, view.strides, view.dtype) == ((3, 3), (6, 2), "float32")
    assert (view.platform, view.device, view.readonly) == ("nvidia", 3, False)
    assert producer.log == []
    del view
    assert producer.log == ["released"]


def test_dlpack_of_every_gpu_kind() -> None:
    array = np.zeros(2, np.float32)
    for number, platform in ((2, "nvidia"), (13, "nvidia"), (10, "amd")):
        assert view_of(Producer(array, (number, 0))).platform == platform
    for number in (1, 3, 4, 7, 11):
        assert as_device_array(Producer(array, (number, 0))) is None


def test_dlpack_without_strides_with_an_offset_and_read_only() -> None:
    def change(managed: Any) -> None:
        managed.tensor.strides = None
        managed.tensor.byte_offset = 8

    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    view = view_of(Producer(array, change=change))
    assert view.pointer == array.ctypes.data + 8
    assert view.strides is None
    assert view.readonly


def test_dlpack_without_a_deleter() -> None:
    def change(managed: Any) -> None:
        managed.deleter = None

    before = dict(dlpack._lent)
    assert view_of(Producer(np.zeros(2, np.float32), change=change)).shape == (2,)
    for address in set(dlpack._lent) - set(before):
        del dlpack._lent[address]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float64", "float64"),
        ("int8", "int8"),
        ("uint32", "uint32"),
        ("bool", "bool"),
    ],
)
def test_dlpack_dtypes(dtype: str, name: str) -> None:
    view = view_of(Producer(np.zeros(4, dtype)))
    assert view.dtype == name
    wanted = "expected float32, float16 or bfloat16"
    with pytest.raises(
        ArgumentError, match=rf"'x': {wanted}, got {name} \[4\] on nvidia device 3; use"
    ):
        require_float(view, "x")


def test_dlpack_halves_are_read_in_place() -> None:
    f16 = view_of(Producer(np.zeros(4, np.float16)))
    bf16 = view_of(Producer(np.zeros(4, np.float16), change=_set(code=4, bits=16)))
    assert (f16.dtype, f16.nbytes, require_float(f16, "x")) == ("float16", 8, "f16")
    assert (bf16.dtype, bf16.nbytes, require_float(bf16, "x")) == ("bfloat16", 8, "bf16")


def _set(**values: int) -> Callable[[Any], None]:
    def change(managed: Any) -> None:
        for name, value in values.items():
            setattr(managed.tensor if hasattr(managed.tensor, name) else managed, name, value)

    return change


def test_dlpack_of_unknown_elements_is_refused() -> None:
    view = view_of(Producer(np.zeros(4, np.float32), change=_set(code=9, bits=8)))
    with pytest.raises(ArgumentError, match="got type 9 of 8"):
        require_float(view, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(lanes=4), "DLPack elements: expected 1 lane, got 4 lanes"),
        (_set(major=2), r"DLPack: expected version 0 or 1, got 2\.0$"),
    ],
)
def test_unreadable_dlpack_is_released(change: Callable[[Any], None], message: str) -> None:
    producer = Producer(np.zeros(4, np.float32), change=change)
    with pytest.raises(ArgumentError, match=message):
        as_device_array(producer, "x")
    gc.collect()
    assert producer.log == ["released"]


def test_a_taken_capsule_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"not been taken, got .*used_dltensor_versioned"):
        as_device_array(Producer(np.zeros(4, np.float32), taken=True))


def test_numpy_reads_our_dlpack() -> None:
    producer = Producer(np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1], (1, 0))
    back = np.from_dlpack(producer)  # type: ignore[arg-type]  # its protocol asks for exact keywords
    np.testing.assert_array_equal(back, producer.array)
    del back
    assert producer.log == ["released"]


@pytest.mark.parametrize("array", [np.zeros(3), [1.0], 1.0, None, "text", np.float32(1)])
def test_host_objects_are_no_device_arrays(array: object) -> None:
    assert as_device_array(array) is None


# --- fakes of PyTorch and CuPy ------------------------------------------------------------------


class Tensor:
    """The parts of torch.Tensor that q4jit uses."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], **changes: Any) -> None:
        self.shape, self._strides = shape, strides
        self.device = types.SimpleNamespace(type="cuda", index=1)
        self.dtype, self.layout, self.requires_grad = "torch.float32", "strided", False
        self.negative = False
        self.__dict__.update(changes)

    def data_ptr(self) -> int:
        return 4096

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def is_contiguous(self) -> bool:
        return self._strides == np.zeros(self.shape, np.int8).strides

    def is_neg(self) -> bool:
        return self.negative

    def is_conj(self) -> bool:
        return False

    def new_empty(self, shape: tuple[int, ...], dtype: str) -> "Tensor":
        return Tensor(shape, np.zeros(shape, np.int8).strides, dtype=dtype, device=self.device)


@pytest.fixture(params=[None, "7.0"])
def torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("torch")
    module.Tensor, module.strided, module.float32 = Tensor, "strided", "torch.float32"
    module.nn = types.SimpleNamespace(Parameter=type("Parameter", (Tensor,), {}))
    module.version = types.SimpleNamespace(hip=request.param)
    module.grad = True
    module.is_grad_enabled = lambda: module.grad
    module._C = types.SimpleNamespace()
    stream = types.SimpleNamespace(cuda_stream=11)
    module.cuda = types.SimpleNamespace(current_stream=lambda index: stream if index == 1 else None)
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_the_view_of_a_tensor(torch: Any) -> None:
    tensor = Tensor((2, 3), (3, 1))
    view = view_of(tensor)
    platform = "amd" if torch.version.hip else "nvidia"
    assert tuple(view) == (4096, (2, 3), None, F32, platform, 1, False, "torch", None, tensor)
    assert current_stream(view) == 11
    new = empty_like_kind(view, (5, 6), "f32")
    assert type(new) is Tensor
    assert (new.shape, new.dtype, new.device.index) == ((5, 6), "torch.float32", 1)


def test_the_stream_by_pytorchs_private_function(torch: Any) -> None:
    torch._C._cuda_getCurrentRawStream = lambda index: 12 + index
    assert current_stream(view_of(Tensor((1,), (1,)))) == 13


def test_a_tensor_on_the_host_is_no_device_array(torch: Any) -> None:
    assert as_device_array(Tensor((1,), (1,), device=types.SimpleNamespace(type="cpu"))) is None


def test_a_call_without_tensors_asks_for_no_stream(torch: Any) -> None:
    view_of(Tensor((2, 3), (3, 1)))  # now q4jit knows that PyTorch is in use
    double = specialize(lambda d, x: [d["scale"] * x], target="cpu")
    x = np.ones((1, 32), np.float32)
    (y,) = double({"scale": 2.0}, x)
    np.testing.assert_array_equal(y, 2 * x)
    with pytest.raises(TraceError, match="cannot"):  # a list has no tensors either
        specialize(lambda x: np.exp(x) * 2, target="cpu")([1.0, 2.0])


def test_unsupported_tensors_are_refused(torch: Any) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ArgumentError, match=message):
            as_device_array(Tensor((2,), (1,), **changes), "x")

    refused(r"'x': .*requires a gradient; use x\.detach\(\)", requires_grad=True)
    refused(r"sparse.*x\.to_dense\(\)", layout="sparse_coo")
    refused(r"negated.*resolve_neg", negative=True)
    torch.grad = False
    assert view_of(Tensor((2,), (1,), requires_grad=True)).shape == (2,)


def test_refused_tensors_come_with_the_conversion(torch: Any) -> None:
    f8 = view_of(Tensor((2, 2), (2, 1), dtype="torch.float8_e4m3fn"))
    with pytest.raises(ArgumentError, match=r"got float8_e4m3fn \[2, 2\].*; use x\.float\(\)"):
        require_float(f8, "x")
    bf16 = view_of(Tensor((2, 2), (2, 1), dtype="torch.bfloat16"))
    assert require_float(bf16, "x") == "bf16"
    transposed = view_of(Tensor((2, 3), (1, 2)))
    require_float(transposed, "x")
    with pytest.raises(ArgumentError, match=r"strides of \[1, 2\] elements.*x\.contiguous\(\)"):
        require_contiguous(transposed, "x")
    require_contiguous(bf16, "x")


@dataclass
class CupyArray:
    """The parts of cupy.ndarray that q4jit uses."""

    like: np.ndarray[Any, Any]
    data = types.SimpleNamespace(ptr=8192, device_id=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like, name)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("cupy")
    module.ndarray = CupyArray
    module.entered = []

    class Current:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            module.entered.append(self.index)

        def __exit__(self, *_: object) -> None:
            module.entered.append(None)

    module.empty = lambda shape, dtype: CupyArray(np.empty(shape, dtype))
    module.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(is_hip=False),
        get_current_stream=lambda device: types.SimpleNamespace(ptr=20 + device),
        Device=Current,
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_the_view_of_a_cupy_array(cupy: Any) -> None:
    array = CupyArray(np.zeros((2, 3), np.float32))
    view = view_of(array)
    assert tuple(view) == (8192, (2, 3), None, F32, "nvidia", 2, False, "cupy", None, array)
    assert current_stream(view) == 22
    new = empty_like_kind(view, (4,), "f32")
    assert type(new) is CupyArray
    assert (new.shape, new.dtype, cupy.entered) == ((4,), F32, [2, None])
    transposed = view_of(CupyArray(np.zeros((2, 3), np.float64).T))
    assert transposed.strides == (1, 3)
    with pytest.raises(ArgumentError, match=r"cupy\.ascontiguousarray\(x\)"):
        require_contiguous(transposed, "x")
    with pytest.raises(ArgumentError, match=r"x\.astype\(cupy\.float32\)"):
        require_float(transposed, "x")


# --- several arrays -------------------------------------------------------------------------------


def on(platform: str, device: int) -> DeviceView:
    return DeviceView(8, (1,), None, "float32", platform, device, False, "", None, None)


def test_arrays_on_one_device() -> None:
    assert common_device([on("amd", 1), on("amd", 1)], ["x", "bias"]) == ("amd", 1)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([on("amd", 0), on("amd", 1)], "x on amd device 0 and bias on amd device 1"),
        ([on("amd", 0), on("nvidia", 0)], "x on amd device 0 and bias on nvidia device 0"),
        ([on("amd", 0), None], "x on amd device 0 and bias on the host"),
        ([None, None], "all on one device, or all NumPy's, got x on the host$"),
    ],
)
def test_arrays_on_several_devices_are_refused(
    views: list[DeviceView | None], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        common_device(views, ["x", "bias"])


@pytest.mark.parametrize(
    ("library", "cure"),
    [
        ("torch", r"use torch\.as_tensor\(x, device=bias\.device\)$"),
        ("cupy", r"use cupy\.asarray\(x\) under `with bias\.device:`$"),
        ("", "use a copy of x on the device of bias$"),
    ],
)
def test_the_cure_moves_an_array_to_the_device_of_another(library: str, cure: str) -> None:
    moved = on("amd", 1)._replace(library=library)
    with pytest.raises(ArgumentError, match=cure):
        common_device([None, moved], ["x", "bias"])


def test_complex_arrays_come_with_the_conversion() -> None:
    view = on("amd", 0)._replace(dtype="complex64", library="torch")
    with pytest.raises(ArgumentError, match=r"got complex64 .*use x\.real\.float\(\)"):
        require_float(view, "x")


def test_no_array_is_refused() -> None:
    with pytest.raises(ArgumentError, match="got no array"):
        common_device([], [])


def test_an_array_whose_driver_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from q4jit.arrays.views import device_of

    monkeypatch.setattr("q4jit.arrays.views.drivers", dict)
    monkeypatch.setattr("q4jit.arrays.views.why_none", lambda: "the reason")
    with pytest.raises(DeviceError, match="no driver for the array on amd device 4: the reason"):
        device_of(on("amd", 4))


# --- calls on PyTorch's tensors -------------------------------------------------------------------

CALLS = r"""
import re, types
from q4jit import dispatcher, pipeline, quantize, specialize
from q4jit.dispatch import specializer
from q4jit.arrays import libraries
from q4jit.compilers import find

class Tensor:
    # A tensor in the fake platform's memory; `answers` replace the usual values of attributes.
    def __init__(self, shape, pointer=1 << 20, **answers):
        self.shape, self.answers = shape, {"pointer": pointer, **answers}
    def __getattr__(self, name):
        plain = {"dtype": torch.float32, "layout": torch.strided, "is_cuda": True, "index": 0,
                 "requires_grad": False, "contiguous": True, "neg": False, "is_cpu": False}
        values = {**plain, **self.answers}
        if name == "device":
            kind = "cuda" if values["is_cuda"] else "cpu"
            return types.SimpleNamespace(type=kind, index=values["index"])
        return values[name]
    def data_ptr(self):
        if self.layout is not torch.strided:
            raise RuntimeError("no storage")
        return self.pointer
    def get_device(self):
        return self.index
    def is_contiguous(self):
        return self.contiguous
    def is_neg(self):
        return self.neg
    def is_conj(self):
        return False
    def stride(self):
        return (999,) * len(self.shape)
    def new_empty(self, shape, dtype):
        return Tensor(shape, 7 << 20, dtype=dtype)

class Parameter(Tensor):
    pass

class Subclass(Tensor):
    pass

torch = types.ModuleType("torch")
torch.Tensor, torch.nn = Tensor, types.SimpleNamespace(Parameter=Parameter)
torch.strided, torch.sparse_coo = object(), object()
for name in ("float32", "float16", "float64", "int64"):
    setattr(torch, name, type("dtype", (), {"__str__": lambda self, name=name: "torch." + name})())
torch.version = types.SimpleNamespace(hip=platform == "amd" or None)
torch.grad, torch.stream = True, 5
torch.is_grad_enabled = lambda: torch.grad
torch._C = types.SimpleNamespace(_cuda_getCurrentRawStream=lambda index: torch.stream + index)
sys.modules["torch"] = torch

driver, first, second = start()

def ready_kernels(sources, fetch, load, device):
    # Fake kernels: the number in the name is the number of values that the fake launch records.
    ready = []
    for source in sources:
        (parameters,) = re.findall(rf"void {source.symbol}\(([^)]*)\)", source.text)
        name = f"k_{parameters.count(',') + 1}"
        loaded = driver.load(device.index, fake.code(device.index), name)
        entry = types.SimpleNamespace(origin="compiled", object_bytes=b"", key="fake")
        ready.append(pipeline.ReadyKernel(source, entry, loaded))
    return ready

specializer.ready_kernels = ready_kernels
specializer._dump = lambda plan, kernels, compiler: None
find.find_compiler = lambda target: types.SimpleNamespace(fingerprint=lambda target: "fake")
zeros = np.zeros((64, 32), np.float32)
w, v = (quantize(zeros, "Q4_0") for _ in range(2))

def product(x, w):
    return x @ w

def scaled(x, w, factor):
    return factor * (x @ w)

def slots(f):
    # the values of the last launch, by kind
    (plan, _), *_ = reversed(f._specializer.kept.plans.values())
    kinds = [slot.kind for slot in plan.kernels[0].slots()]
    return dict(zip(kinds, struct.unpack_from(f"<{len(kinds)}Q", fake.values())))

def answer(f, *args, out=None):
    # The type of a call's result and its launch, or its error.
    before = fake["launches"]
    try:
        result = f(*args, out=out)
    except Exception as error:
        return type(error).__name__, str(error)
    assert out is None or result is out
    launched = fake["launches"] - before
    return type(result), launched, launched and (fake.stream(), slots(f))

def warm(function=product, *more):
    f = specialize(function, target="hip")
    x, out = Tensor((1, 64)), Tensor((1, 32), 2 << 20)
    for _ in range(2):
        f(x, w, *more, out=out)
        f(x, w, *more)
    assert len(f._on_tensors) == 2 and f.stats.hits == 3
    return f
"""


@pytest.fixture
def calls(run: Run) -> Run:
    return lambda program: run(textwrap.dedent(CALLS) + textwrap.dedent(program))


def test_a_warm_call_takes_its_own_tensors_weight_number_and_stream(calls: Run) -> None:
    calls("""
        f = warm(scaled, 1.0)
        f(Tensor((1, 64)), w, np.float32(1.0), out=Tensor((1, 32), 2 << 20))  # another type
        checked, check = [], libraries.as_device_array
        libraries.as_device_array = lambda *args: checked.append(args) or check(*args)
        torch.stream = 9
        out = Tensor((1, 32), 4 << 20)
        for number in (0.5, np.float32(0.5)):
            assert f(Tensor((1, 64), 3 << 20), v, number, out=out) is out
            passed = slots(f)
            assert (passed["array"], passed["output"]) == (3 << 20, 4 << 20)
            assert struct.pack("<Q", passed["scalar"])[:4] == struct.pack("<f", 0.5)
            assert passed["weight"] in {memory.pointer for memory in v._resident.uploads.values()}
            assert fake.stream() == 9
        y = f(Parameter((1, 64), 3 << 20), v, 0.5)
        assert type(y) is Tensor and y.shape == (1, 32) and y.dtype is torch.float32
        assert slots(f)["output"] == y.data_ptr() == 7 << 20
        assert not checked, "warm calls do not need as_device_array"
        f(Subclass((1, 64)), v, 0.5)
        assert checked, "a subclass may override what its memory says"
    """)


def test_a_warm_function_answers_like_a_cold_one(calls: Run) -> None:
    calls("""
        x, out = Tensor((1, 64)), Tensor((1, 32), 2 << 20)
        f16, ids, sparse = torch.float16, torch.int64, torch.sparse_coo
        changes = (
            dict(dtype=f16), dict(dtype=ids), dict(layout=sparse), dict(contiguous=False),
            dict(neg=True), dict(requires_grad=True), dict(is_cuda=False), dict(index=1),
        )
        arguments = [x, Tensor((2, 64)), Tensor((64,)), Tensor((1, 1, 64)), Tensor((0, 64), 0),
                     Tensor((1, 63)), Tensor(()), Subclass((1, 64)), 1.0, w]
        arguments += [Tensor((1, 64), **change) for change in changes]
        outs = [None, out, (out,), (out, out), (), Tensor((2, 32)), Tensor((32,)), zeros[:1],
                Subclass((1, 32), 2 << 20), 1.0, "text"]
        outs += [Tensor((1, 32), (1 << 20) + at) for at in (-128, -127, 0, 255, 256)]
        outs += [Tensor((1, 32), 2 << 20, **change) for change in changes]
        refused, facts = 0, dispatcher.tensor_facts
        for torch.grad in (True, False):
            known = warm()
            for x_or_other in arguments:
                for given in outs:
                    dispatcher.tensor_facts = lambda args, out: None
                    cold = answer(specialize(product, target="hip"), x_or_other, w, out=given)
                    dispatcher.tensor_facts = facts
                    for turn in range(2):
                        assert answer(known, x_or_other, w, out=given) == cold
                    refused += isinstance(cold[0], str)
        assert refused > 800, refused
    """)


def test_an_output_may_adjoin_an_argument_but_not_overlap_it(calls: Run) -> None:
    calls("""
        f = warm()
        x = Tensor((1, 64), 4096)
        for at in (4096 - 128, 4096 + 256):
            f(x, w, out=Tensor((1, 32), at))
        for at in (4096 - 127, 4096, 4096 + 255):
            with refused(ArgumentError, "out= overlaps an argument"):
                f(x, w, out=Tensor((1, 32), at))
    """)


def test_outputs_of_a_warm_call_must_not_overlap(calls: Run) -> None:
    calls("""
        f = specialize(lambda x, w: (x @ w, -(x @ w)), target="hip")
        x = Tensor((1, 64))
        f(x, w, out=(Tensor((1, 32), 2 << 20), Tensor((1, 32), 3 << 20)))
        f(x, w, out=(Tensor((1, 32), 2 << 20), Tensor((1, 32), (2 << 20) + 128)))
        assert f.stats.hits == 1 and len(f._on_tensors) == 1
        for at in ((2 << 20) - 127, (2 << 20), (2 << 20) + 127):
            with refused(ArgumentError, "another array of out="):
                f(x, w, out=(Tensor((1, 32), 2 << 20), Tensor((1, 32), at)))
    """)


def test_static_values_of_warm_calls_are_distinguished(calls: Run) -> None:
    calls("""
        def either(x, w, flag):
            return x @ w if flag else -(x @ w)
        f = specialize(either, target="hip")
        x, out = Tensor((1, 64)), Tensor((1, 32), 2 << 20)
        for flag in (True, 1, False, 0, None, "", "text"):
            for _ in range(2):
                f(x, w, flag, out=out)
        assert f.stats.misses == len(f._on_tensors) == len(f.signatures) == 7
    """)


def test_tensors_in_containers(calls: Run) -> None:
    calls("""
        from typing import NamedTuple
        class Layer(NamedTuple):
            w: object
            factor: float
        def block(d, layer):
            return {"y": layer.factor * (d["x"] @ layer.w), "n": d["n"]}
        f = specialize(block, target="hip")
        checked, check = [], libraries.as_device_array
        libraries.as_device_array = lambda *args: checked.append(args) or check(*args)
        for turn in range(3):
            x = Tensor((1, 64), (3 + turn) << 20)
            result = f({"x": x, "n": 2}, Layer(w, 0.5))
            assert type(result) is dict and type(result["y"]) is Tensor and result["n"] == 2
            passed = slots(f)
            assert (passed["array"], passed["output"]) == (x.pointer, 7 << 20)
            assert struct.pack("<Q", passed["scalar"])[:4] == struct.pack("<f", 0.5)
            names = [name for _, name in checked if name != "out"]
            assert names == ["d['x']"] * (turn < 2), "PyTorch is known from the second call on"
            out = {"y": Tensor((1, 32), 9 << 20), "n": 2}
            assert f({"x": x, "n": 2}, Layer(v, 1.5), out=out) is out
            assert slots(f)["output"] == 9 << 20
            checked.clear()
        assert (f.stats.misses, f.stats.hits, len(f._on_tensors)) == (1, 5, 1)
        assert type(f.bind({"x": x, "n": 2}, Layer(w, 0.5))()["y"]) is Tensor
        with refused(ArgumentError, "d['x']", "requires a gradient"):
            f({"x": Tensor((1, 64), requires_grad=True), "n": 2}, Layer(w, 0.5))
        with refused(ArgumentError, "layer.factor", "float32"):
            f({"x": x, "n": 2}, Layer(w, Tensor((1, 32), dtype=torch.float64)))
        with refused(ArgumentError, "out=: expected containers like those of the result"):
            f({"x": x, "n": 2}, Layer(w, 0.5), out={"y": Tensor((1, 32), 9 << 20), "n": 3})
        with refused(ArgumentError, "out= overlaps"):
            f({"x": x, "n": 2}, Layer(w, 0.5), out={"y": Tensor((1, 32), x.pointer), "n": 2})
    """)


def test_results_of_several_tensors_in_containers(calls: Run) -> None:
    calls("""
        f = specialize(lambda x, ws: [x @ ws[0], (x @ ws[1],)], target="hip")
        for turn in range(2):
            out = [Tensor((1, 32), 2 << 20), (Tensor((1, 32), 3 << 20),)]
            assert f(Tensor((1, 64)), [w, v], out=out) is out
        with refused(ArgumentError, "expected containers like those of the result, [array, (arra"):
            f(Tensor((1, 64)), [w, v], out=(out[0], out[1][0]))
    """)


def test_known_results_in_out_are_checked_in_warm_calls(calls: Run) -> None:
    calls("""
        f = specialize(lambda x, w, s: (s * (x @ w), s, w), target="hip")
        x, y = Tensor((1, 64)), Tensor((1, 32), 2 << 20)
        for s in (0.5, 1.5, 2.5):
            out = y, s, w
            assert f(x, w, s, out=out) is out
            assert f(x, w, s)[1:] == (s, w)
        hits = f.stats.hits
        assert len(f._on_tensors) == 2 and hits == 5
        before = fake["launches"]
        for out in ((y, 3.5, w), (y, s, v)):
            with refused(ArgumentError, "out=: expected containers like those of the result, (arr"):
                f(x, w, s, out=out)
        assert f.stats.hits == hits + 2 and fake["launches"] == before
    """)


def test_a_kernel_is_loaded_once_per_device(calls: Run) -> None:
    calls("""
        from q4jit.hip.backend import BACKEND
        source = types.SimpleNamespace(symbol="k_2", target="hip")
        before, code = fake["modules"], fake.code()
        kernel = BACKEND.load(code, source, first)
        assert BACKEND.load(bytes(bytearray(code)), source, first) is kernel
        assert fake["modules"] == before + 1
        other = BACKEND.load(fake.code(1), source, second)
        assert other is not kernel and other.device == second
        assert fake["modules"] == before + 2
    """)


def test_many_ints_are_bounded_on_a_gpu_too(calls: Run) -> None:
    calls("""
        import warnings
        from q4jit.dispatch import kept
        warnings.simplefilter("ignore")
        kept.MOST_CALLS, kept.MOST_PLANS = 8, 3
        def unused(x, w, n):
            return x @ w
        def used(x, w, n):
            return x @ w * n
        x, out = Tensor((1, 64)), Tensor((1, 32), 2 << 20)
        for function in (unused, used):
            f = specialize(function, target="hip")
            for n in range(40):
                for _ in range(2):
                    f(x, w, n, out=out)
                    f(x, w, 1000, out=out)
                assert len(f._on_tensors) <= 8 and len(f._launches) <= 8
                assert len(f._specializer.kept.compiled) <= 7
            assert f.stats.hits >= 70
    """)


def test_a_launch_does_not_keep_a_weight(calls: Run) -> None:
    calls("""
        f = warm()
        before = fake.allocations()
        fresh = quantize(zeros, "Q4_0")
        for _ in range(2):
            f(Tensor((1, 64)), fresh, out=Tensor((1, 32), 2 << 20))
        assert fake.allocations() == before + 1
        del fresh
        assert fake.allocations() == before
    """)


# --- on a real GPU --------------------------------------------------------------------------------


@pytest.fixture
def device() -> Device:
    gpus = devices.find_devices()
    if not gpus:
        pytest.skip(devices.why_none())
    return gpus[0]


@pytest.fixture(params=["torch", "cupy"])
def library(request: pytest.FixtureRequest, device: Device) -> Iterator[Any]:
    """Yield a library whose arrays are on the device."""
    module: Any = pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    if request.param == "torch" and not module.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    yield module
    gc.collect()


def _arange(library: Any, count: int) -> Any:
    if library.__name__ == "torch":
        return library.arange(count, dtype=library.float32, device="cuda")
    return library.arange(count, dtype=library.float32)


@pytest.mark.gpu
def test_gpu_arrays_are_viewed_in_place(library: Any, device: Device) -> None:
    array = _arange(library, 12).reshape(3, 4)
    view = view_of(array)
    assert (view.shape, view.strides, view.dtype) == ((3, 4), None, "float32")
    assert (view.platform, view.device) == (device.platform, device.index)
    assert view.library == library.__name__
    assert view.pointer == array.__cuda_array_interface__["data"][0]
    driver = devices.driver_of(device)
    assert driver.device_of(view.pointer) == device.index
    back = np.empty((3, 4), np.float32)
    stream = current_stream(view)
    driver.copy_to_host(device.index, back.ctypes.data, view.pointer, back.nbytes, stream)
    driver.synchronize(device.index, stream)
    np.testing.assert_array_equal(back.ravel(), np.arange(12))
    assert view_of(array.T).strides == (1, 4)
    new = empty_like_kind(view, (5, 2), "f32")
    assert type(new) is type(array)
    assert tuple(new.shape) == (5, 2)
    assert view_of(new).dtype == F32


@pytest.mark.gpu
def test_gpu_arrays_through_the_protocols(library: Any, device: Device) -> None:
    array = _arange(library, 12).reshape(3, 4)[1:]

    class Interface:
        __cuda_array_interface__ = array.__cuda_array_interface__

    class Dlpack:
        def __dlpack_device__(self) -> Any:
            return array.__dlpack_device__()

        def __dlpack__(self, **options: Any) -> Any:
            return array.__dlpack__(**options)

    expected = view_of(array)
    for foreign in (Interface(), Dlpack()):
        view = view_of(foreign)
        assert view[:7] == expected[:7]


@pytest.mark.gpu
def test_gpu_own_arrays_in_other_libraries(library: Any, device: Device) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    own = DeviceArray.from_numpy(values, device)
    taken = [library.from_dlpack(own)]
    if library.__name__ == "torch":
        taken.append(library.as_tensor(own, device="cuda"))
    else:
        taken.append(library.asarray(own))
    for i in range(len(taken)):
        assert view_of(taken[i]).pointer == own.pointer
        taken[i] += 1  # in place, so all arrays change
    if library.__name__ == "torch":
        library.cuda.synchronize()
    else:
        library.cuda.Device().synchronize()
    np.testing.assert_array_equal(own.to_numpy(), values + 2)
    del taken
    gc.collect()
    assert dlpack._lent == {}


@pytest.mark.gpu
def test_gpu_current_stream_and_capture(device: Device) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    driver = devices.driver_of(device)
    view = view_of(torch.zeros(4, device="cuda"))
    assert current_stream(view) == torch.cuda.current_stream().cuda_stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert current_stream(view) == side.cuda_stream
        assert not driver.is_capturing(device.index, side.cuda_stream)
    graph = torch.cuda.CUDAGraph()
    other = DeviceArray((4,), device)
    with torch.cuda.graph(graph):
        stream = current_stream(view)
        assert driver.is_capturing(device.index, stream)
        DeviceArray((4,), device)  # allocating and freeing must not end the capture
        del other
        driver.fill(device.index, view.pointer, 0xFF, 16, stream)
    assert not bool(torch.isnan(view.owner).any())
    graph.replay()
    torch.cuda.synchronize()
    assert bool(torch.isnan(view.owner).all())


@pytest.mark.gpu
def test_gpu_gradients_are_refused(device: Device) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    tensor = torch.zeros(4, device="cuda", requires_grad=True)
    with pytest.raises(ArgumentError, match="detach"):
        as_device_array(tensor, "x")
    with torch.no_grad():
        assert view_of(tensor).shape == (4,)
    assert view_of(tensor.detach()).shape == (4,)
    assert require_float(view_of(tensor.detach().bfloat16()), "x") == "bf16"
