"""GPUs and their drivers: the real bindings on a fake runtime, and on a GPU if there is one."""

import subprocess
import sys
from pathlib import Path

import pytest

from q4jit.compilers.find import find_compiler
from q4jit.errors import DeviceError, TargetError
from q4jit.runtime import devices
from q4jit.runtime.driver import Device
from q4jit.targets import Target
from tests.support import child, fake_gpu
from tests.support.fake_gpu import Run
from tests.support.tools import lack


@pytest.fixture(params=["amd", "nvidia"], scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a program on a fake platform and checks that it succeeds."""
    return fake_gpu.runner(tmp_path_factory.mktemp("fake"), request.param)


def test_devices_are_described(run: Run) -> None:
    run("""
        first, second = find_devices()
        assert why_none() == ""
        assert (first.index, second.index) == (0, 1) and first.platform == platform
        assert first.name == "Fake 0" and first.id != second.id
        archs = {"amd": ("gfx1100", "gfx1036"), "nvidia": ("sm_90", "sm_80")}[platform]
        assert (first.arch, second.arch) == archs  # without the features after the colon
        assert (first.integrated, second.integrated) == (False, True)
        assert first.memory_bytes == 1 << 20 and first.wave == 32
        assert first.max_block_size == 1024 and first.compute_units >= 96
        assert first.lds_bytes == {"amd": 64 << 10, "nvidia": 227 << 10}[platform]
        assert min(first.l2_bytes, first.clock_khz) > 0
        assert str(first) == f"{platform} device 0 (Fake 0, {archs[0]})"
    """)


def test_devices_have_names(run: Run) -> None:
    run("""
        first, second = find_devices()
        for name in ("hip", "hip:0", f"hip:{first.arch}"):
            assert find_device(name) == first
        assert find_device("hip:1") == find_device(f"hip:{second.arch}") == second
        for name in ("hip:2", "hip:gfx906", "hip:", "gpu", "hip:-1", "hip:0:1"):
            with refused(DeviceError, repr(name), f"hip:0 = {first}", f"hip:1 = {second}"):
                find_device(name)
        if platform == "nvidia":
            assert find_device("cuda:1") == second
        else:
            with refused(DeviceError, "'cuda'"):
                find_device("cuda")
    """)


def test_memory_is_copied_filled_and_freed(run: Run) -> None:
    run("""
        driver, first, second = start()
        array, back = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
        for device in (0, 1):
            a, b = driver.allocate(device, 256), driver.allocate(device, 256)
            assert driver.device_of(a) == driver.device_of(a + 255) == device
            assert driver.memory_info(device) == (first.memory_bytes - 512, first.memory_bytes)
            assert driver.memory_info(1 - device)[0] == first.memory_bytes
            driver.copy_to_device(device, a, on_host(array), 256, 0)
            driver.copy_on_device(device, b, a, 256, 0)
            driver.fill(device, b, 0xFF, 4, 7)
            driver.copy_to_host(device, on_host(back), b, 256, 0)
            driver.synchronize(device, 0)
            assert np.isnan(back[0]) and (back[1:] == array[1:]).all()
            driver.free(device, a)
            driver.free(device, b)
        assert driver.device_of(on_host(array)) is None
        assert fake.allocations() == 0
        assert fake["relaxed_calls"] == 8, "every allocation lets other threads capture graphs"
    """)


def test_zero_bytes_need_no_call(run: Run) -> None:
    run("""
        driver, *_ = start()
        assert driver.allocate(0, 0) == 0
        driver.free(0, 0)
        driver.copy_to_device(0, 0, 0, 0, 0)
        driver.fill(0, 0, 1, 0, 0)
        assert fake.allocations() == 0
    """)


def test_a_call_restores_the_current_device(run: Run) -> None:
    run("""
        driver, *_ = start()
        library, cell = fake.library, ctypes.c_uint64()
        if platform == "amd":
            library.hipSetDevice(1)
            get, before = library.hipGetDevice, 1
        else:
            get, before = library.cuCtxGetCurrent, 0  # no context in this thread
        kernel = driver.load(0, fake.code(), "k_0")
        launch = driver.prepare(kernel, (1, 1, 1), (32, 1, 1), 0, "")
        driver.free(0, driver.allocate(0, 8))
        launch(0)
        assert fake["launch_device"] == 0
        get(ctypes.byref(cell))
        assert cell.value == before
        fake.fail("hipMalloc", "cuMemAlloc_v2", 999)
        with refused(DeviceError, "999"):
            driver.allocate(0, 8)
        get(ctypes.byref(cell))
        assert cell.value == before
    """)


def test_a_prepared_launch_packs_its_values(run: Run) -> None:
    run("""
        driver, first, second = start()
        kernel = driver.load(1, fake.code(1), "k_4")
        assert kernel.device == second and kernel.symbol == "k_4"
        launch = driver.prepare(kernel, (7, 2, 3), (64, 2, 1), 96, "Piqf")
        for stream, values in ((5, (2**63 + 8, -3, -(2**40), 0.5)), (0, (16, 4, 2**40, -1.5))):
            launch(stream, *values)
            assert fake.shape() == [7, 2, 3, 64, 2, 1, 96]
            assert (fake.stream(), fake["launch_device"]) == (stream, 1)
            slots = fake.values()
            assert struct.unpack_from("<Qi4xqf", slots) == values
        for device in (0, 1):  # the device that is current
            if platform == "amd":
                fake.library.hipSetDevice(device)
            else:
                fake.library.cuCtxSetCurrent(1000 + device)
            launch(1, 8, 1, 1, 1.0)
            assert fake["launch_device"] == 1
        assert fake["launches"] == 4
        kernel.close()
        kernel.close()
        assert fake["modules"] == 0
    """)


def test_a_prepared_launch_orders_values_and_adds_fixed_values(run: Run) -> None:
    run("""
        driver, *_ = start()
        kernel = driver.load(0, fake.code(), "k_4")
        orders = {None: "<Qf4xqq", (3, 1, 0, 0): "<qf4xQQ", (2, 3, 1, 0): "<qqf4xQ"}
        for order, packed in orders.items():
            launch = driver.prepare(kernel, (1, 1, 1), (1, 1, 1), 0, "Pf", (-7, 2**40), order)
            for _ in range(2):
                launch(0, 4096, 0.5)
                every = 4096, 0.5, -7, 2**40
                wanted = tuple(every[index] for index in order or range(4))
                assert struct.unpack_from(packed, fake.values()) == wanted
    """)


def test_a_launch_can_overlap_the_previous_kernel(run: Run) -> None:
    run("""
        driver, *_ = start()
        kernel = driver.load(0, fake.code(), "k_2")
        shape = (5, 2, 1), (64, 1, 1), 0
        driver.prepare(kernel, *shape, "PP")(7, 4096, 8192)
        if platform == "amd":  # has no such launch
            sys.exit()
        assert fake["early_launches"] == 0
        launch = driver.prepare(kernel, *shape, "Pi", (), (1, 0), True)
        for stream in (0, 9):
            launch(stream, 4096, -3)
            assert fake.stream() == stream and fake.shape() == [5, 2, 1, 64, 1, 1, 0]
            assert struct.unpack_from("<i4xQ", fake.values()) == (-3, 4096)
        assert (fake["launches"], fake["early_launches"]) == (3, 2)
        name = fake.fail("-", "cuLaunchKernelEx", 719)
        with refused(DeviceError, name, "k_2"):
            launch(0, 4096, -3)
    """)


def test_any_thread_can_call_a_prepared_launch(run: Run) -> None:
    run("""
        driver, *_ = start()
        launch = driver.prepare(driver.load(0, fake.code(), "k_1"), (1, 1, 1), (1, 1, 1), 0, "P")
        sys.setswitchinterval(1e-6)
        def work(value):
            for _ in range(2000):
                launch(0, value)
        threads = [threading.Thread(target=work, args=[10**i]) for i in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert fake["launches"] == 8000
        assert fake["launch_sum"] == 2000 * 1111, "each launch has the value of its own thread"
    """)


def test_limits_of_a_block_are_checked(run: Run) -> None:
    run("""
        driver, first, _ = start()
        kernel = driver.load(0, fake.code(), "k_0")
        for block in ((0, 1, 1), (1025, 1, 1), (64, 32, 1)):
            with refused(DeviceError, "k_0", "×".join(map(str, block)), "1 to 1024", str(first)):
                driver.prepare(kernel, (1, 1, 1), block, 0, "")
        for size_bytes in (-1, first.lds_bytes + 1):
            with refused(DeviceError, f"{first.lds_bytes:,} bytes, got {size_bytes:,}", str(first)):
                driver.prepare(kernel, (1, 1, 1), (32, 1, 1), size_bytes, "")
        driver.prepare(kernel, (1, 1, 1), (32, 1, 1), first.lds_bytes, "")
        driver.prepare(kernel, (1, 1, 1), (32, 1, 1), 64, "")
        if platform == "nvidia":
            assert fake["max_dynamic_bytes"] == first.lds_bytes, "raised, and never lowered"
    """)


def test_events_time_a_stream(run: Run) -> None:
    run("""
        driver, *_ = start()
        start, stop = driver.create_event(1), driver.create_event(1)
        driver.record_event(1, start, 3)
        driver.record_event(1, stop, 3)
        assert driver.elapsed_us(1, start, stop) == 1500
        driver.destroy_event(1, start)
        driver.destroy_event(1, stop)
        assert fake["events"] == 0
    """)


def test_is_capturing_asks_the_driver(run: Run) -> None:
    run("""
        driver, *_ = start()
        assert driver.is_capturing(0, 5) is False
        fake["capturing"] = 1
        assert driver.is_capturing(0, 5) is True
        assert driver.is_capturing(0, 0) is False  # the default stream cannot be captured
    """)


def test_a_graph_is_replayed_and_destroyed(run: Run) -> None:
    run("""
        driver, *_ = start()
        kernel = driver.load(1, fake.code(1), "scale_1")
        with driver.new_stream(1) as stream:
            launch = driver.prepare(kernel, (1, 1, 1), (32, 1, 1), 0, "i")
            seen = []
            def work():
                seen.append(driver.is_capturing(1, stream))
                launch(stream, 7)
            with driver.graph(1, stream, work) as replay:
                assert seen == [True] and not driver.is_capturing(1, stream)
                assert fake.stream() == stream and fake["launches"] == 1
                replay()
                replay()
            assert fake["replays"] == 2 and fake["launches"] == 1
            def wrong():
                raise ArgumentError("no")
            with refused(ArgumentError, "no"):
                with driver.graph(1, stream, wrong):
                    raise AssertionError("replayed")
            assert not driver.is_capturing(1, stream)
        assert fake["graphs"] == fake["streams"] == 0
    """)


def test_out_of_memory_names_the_sizes(run: Run) -> None:
    run("""
        driver, first, _ = start()
        held = driver.allocate(0, 1 << 19)
        with refused(DeviceError, f"{platform} device 0", "cannot allocate 900,000 bytes",
                     "524,288 of 1,048,576", "target='cpu'"):
            driver.allocate(0, 900_000)
        driver.free(driver.device_of(held), held)
    """)


def test_the_error_of_a_call_has_its_name_and_a_cure(run: Run) -> None:
    run("""
        driver, *_ = start()
        name = fake.fail("hipStreamSynchronize", "cuStreamSynchronize", 700)
        with refused(DeviceError, name, f"{platform} device 1", "(700)", "start a new process",
                     "AMD_SERIALIZE_KERNEL"):
            driver.synchronize(1, 0)
        name = fake.fail("hipMemcpyAsync", "cuMemcpyHtoDAsync_v2", 900)
        with refused(DeviceError, name.removesuffix("_v2"), "before the capture begins"):
            driver.copy_to_device(0, 8, 8, 8, 0)
        launch = driver.prepare(driver.load(0, fake.code(), "k_0"), (5, 1, 1), (32, 1, 1), 0, "")
        name = fake.fail("hipModuleLaunchKernel", "cuLaunchKernel", 719)
        with refused(DeviceError, name, "k_0", "(5, 1, 1)", "(719)", "start a new process"):
            launch(0)
        launch(0)
        if platform == "amd":  # PyTorch would raise it as its own error
            assert fake["last_error"] == 0
    """)


def test_code_for_another_device_is_refused(run: Run) -> None:
    run("""
        driver, first, second = start()
        with refused(DeviceError, "'missing_0'"):
            driver.load(0, fake.code(), "missing_0")
        assert fake["modules"] == 0
        if platform == "amd":
            with refused(DeviceError, "gfx1036", str(first)):
                driver.load(0, fake.code(1), "k_0")
            with refused(DeviceError, "k_0", str(first), "damaged code object", "cache entry"):
                driver.load(0, b"no code at all", "k_0")
        else:
            with refused(DeviceError, "cuModuleLoadData", "(200)", "cache"):
                driver.load(0, b"no code at all", "k_0")
    """)


@pytest.mark.process
def test_a_forked_child_gets_an_error(run: Run) -> None:
    run("""
        from q4jit.arrays.device_array import DeviceArray
        driver, first, _ = start()
        kernel = driver.load(0, fake.code(), "k_0")
        launch = driver.prepare(kernel, (1, 1, 1), (32, 1, 1), 0, "")
        array = DeviceArray((4,), first)
        pid = os.fork()
        if pid == 0:
            try:
                for call in (lambda: launch(0), lambda: driver.allocate(0, 8),
                             lambda: driver.device_of(8), lambda: array.to_numpy()):
                    with refused(DeviceError, "forked child", "spawn", "target='cpu'"):
                        call()
                kernel.close()
                del array
                gc.collect()
                assert fake.allocations() == 1, "the parent's memory"
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        launch(0)
        assert fake["launches"] == 1
    """)


def test_why_none_says_that_no_device_is_visible(run: Run) -> None:
    run("""
        fake["devices"] = 0
        assert find_devices() == ()
        assert "(100)" in why_none() and "VISIBLE_DEVICES" in why_none(), why_none()
        with refused(DeviceError, "'hip'", "(100)"):
            find_device("hip")
    """)


def test_why_none_says_how_to_install_a_binding(run: Run) -> None:
    run("""
        blocked = {"amd": "rocm.bindings", "nvidia": "cuda.bindings"}[platform]
        for name in [name for name in sys.modules if name.startswith(blocked)]:
            del sys.modules[name]
        sys.modules[blocked] = None
        assert find_devices() == ()
        extra = {"amd": "q4jit[rocm]", "nvidia": "q4jit[nvidia]"}[platform]
        assert f"; pip install '{extra}'" in why_none(), why_none()
        assert "/dev/null exists, but" in why_none(), why_none()
    """)


@pytest.mark.parametrize("problem", ["ImportError", "OSError", "RuntimeError"])
def test_why_none_says_that_a_binding_is_broken(run: Run, problem: str) -> None:
    run(f"""
        from importlib.abc import MetaPathFinder
        blocked = {{"amd": "rocm.bindings", "nvidia": "cuda.bindings"}}[platform]
        for name in [name for name in sys.modules if name.startswith(blocked)]:
            del sys.modules[name]
        class Broken(MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.startswith(blocked):
                    raise {problem}("undefined symbol: gone")
        sys.meta_path.insert(0, Broken())
        assert find_devices() == ()
        extra = {{"amd": "q4jit[rocm]", "nvidia": "q4jit[nvidia]"}}[platform]
        assert "undefined symbol: gone" in why_none() and extra in why_none(), why_none()
    """)


def test_a_finished_search_needs_no_lock(run: Run) -> None:
    run("""
        from q4jit.locks import BUILD
        first, later = find_devices(), []
        with BUILD:  # another thread's compilation holds it
            thread = threading.Thread(target=lambda: later.append(find_devices()), daemon=True)
            thread.start()
            thread.join(20)
        assert later == [first]
    """)


def test_why_none_says_that_the_runtime_is_missing(tmp_path: Path) -> None:
    fake_gpu.build(tmp_path, "amd")
    old = tmp_path / "old"
    (old / "lib").mkdir(parents=True)
    empty = old / "empty.c"
    empty.write_text("int nothing;\n")
    library = str(old / "lib" / "libamdhip64.so")
    subprocess.run(["cc", "-shared", "-fPIC", str(empty), "-o", library], check=True)
    child.run(
        """
        from q4jit.runtime import devices
        devices._NODES.update(amd=("/dev/null",), nvidia=())
        assert devices.find_devices() == ()
        reason = devices.why_none()
        assert "hipInit" in reason and "ROCM_PATH" in reason, reason
        """,
        prelude="",
        ROCM_PATH=str(old),
    )


def test_without_a_device_file_no_binding_is_imported() -> None:
    program = """
import sys
from q4jit.runtime import devices
devices._NODES.update(amd=("/dev/not-a",), nvidia=("/dev/not-b",))
assert devices.find_devices() == ()
reason = "no GPU, or no driver for it (none of /dev/not-a, /dev/not-b exists)"
assert devices.why_none() == reason
assert not any(name.split(".")[0] in ("rocm", "cuda") for name in sys.modules)
try:
    devices.find_device("hip")
except devices.DeviceError as error:
    assert str(error) == f"no device 'hip': {reason}; use the target 'cpu'"
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=child.environment())


# --- on a real GPU --------------------------------------------------------------------------------


@pytest.fixture
def device() -> Device:
    usable = devices.find_devices()
    if not usable:
        pytest.skip(devices.why_none())
    return usable[0]


@pytest.mark.gpu
def test_gpu_memory(device: Device) -> None:
    import numpy as np

    driver = devices.driver_of(device)
    free, total = driver.memory_info(device.index)
    assert 0 < free <= total
    array = np.arange(1 << 20, dtype=np.float32)
    pointer = driver.allocate(device.index, array.nbytes)
    assert driver.device_of(pointer) == device.index
    assert driver.device_of(array.ctypes.data) is None
    driver.copy_to_device(device.index, pointer, array.ctypes.data, array.nbytes, 0)
    driver.fill(device.index, pointer, 0, 4096, 0)
    back = np.empty_like(array)
    driver.copy_to_host(device.index, back.ctypes.data, pointer, array.nbytes, 0)
    driver.synchronize(device.index, 0)
    assert not back[:1024].any()
    np.testing.assert_array_equal(back[1024:], array[1024:])
    driver.free(device.index, pointer)
    with pytest.raises(DeviceError, match="cannot allocate"):
        driver.allocate(device.index, 4 * total)


@pytest.mark.gpu
def test_gpu_launch(device: Device) -> None:
    import numpy as np

    from q4jit.arrays.device_array import DeviceArray

    driver = devices.driver_of(device)
    kernel = driver.load(device.index, _scale_kernel(device), "scale_3")
    x = np.arange(1000, dtype=np.float32)
    on_device = DeviceArray.from_numpy(x, device)
    launch = driver.prepare(
        kernel, (4, 1, 1), (256, 1, 1), 64 << 10 if _large(device) else 0, "Pif"
    )
    start, stop = driver.create_event(device.index), driver.create_event(device.index)
    driver.record_event(device.index, start, 0)
    launch(0, on_device.pointer, 1000, 2.5)
    driver.record_event(device.index, stop, 0)
    assert 0 < driver.elapsed_us(device.index, start, stop) < 1e6
    np.testing.assert_array_equal(on_device.to_numpy(), x * np.float32(2.5))
    driver.destroy_event(device.index, start)
    driver.destroy_event(device.index, stop)
    kernel.close()


@pytest.mark.gpu
def test_gpu_launch_is_quick(device: Device) -> None:
    import timeit

    driver = devices.driver_of(device)
    kernel = driver.load(device.index, _scale_kernel(device), "scale_3")
    pointer = driver.allocate(device.index, 4)
    launch = driver.prepare(kernel, (1, 1, 1), (32, 1, 1), 0, "Pif")
    with driver.current(device.index):
        launch(0, pointer, 1, 1.0)
        per_call_s = min(timeit.repeat(lambda: launch(0, pointer, 1, 1.0), number=500, repeat=20))
        driver.synchronize(device.index, 0)
    driver.free(device.index, pointer)
    assert per_call_s / 500 < 20e-6  # about 3 µs, including the driver's own part


@pytest.mark.gpu
def test_gpu_refuses_foreign_code(device: Device) -> None:
    with pytest.raises(DeviceError):
        devices.driver_of(device).load(device.index, b"\x7fELF" + bytes(200), "nothing")


def _large(device: Device) -> bool:
    """Return whether a thread block can have more shared memory than NVIDIA's default of 48 KB."""
    return device.platform == "nvidia" and device.lds_bytes > 64 << 10


def _scale_kernel(device: Device) -> bytes:
    """Return a code object whose kernel scale_3 multiplies n floats by a factor."""
    return _scale_code(Target("hip", device.arch))


def _scale_code(target: Target) -> bytes:
    try:
        compiler = find_compiler(target)
    except TargetError as error:
        lack(str(error))
    return compiler.compile_object(_scale_text(target), target)


def _scale_text(target: Target) -> str:
    """Return a kernel in each compiler's own syntax: clang has no header that has `__global__`."""
    if target.hip.is_nvidia:
        qualifier, index = "__global__", "blockIdx.x * blockDim.x + threadIdx.x"
    else:
        qualifier = "__attribute__((global, amdgpu_flat_work_group_size(1, 256)))"
        index = "__builtin_amdgcn_workgroup_id_x() * 256 + __builtin_amdgcn_workitem_id_x()"
    return (
        f'extern "C" {qualifier} void scale_3(float *x, int n, float factor) {{\n'
        f"    int i = {index};\n"
        "    if (i < n) x[i] *= factor;\n"
        "}\n"
    )


@pytest.mark.parametrize("arch", ["gfx1100", "sm_90"])
def test_the_kernel_for_real_gpus_compiles(arch: str) -> None:
    assert b"scale_3" in _scale_code(Target("hip", arch))
