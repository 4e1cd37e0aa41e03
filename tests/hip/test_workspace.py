"""Scratch memory on a device: one piece per stream, freed with the thread that owns the stream."""

import pytest

from tests.support import fake_gpu
from tests.support.fake_gpu import PRELUDE, Run

SCRATCH = """
from q4jit.hip.workspace import DeviceScratch

OWN = 2  # the handle of each thread's own stream

def address(device, stream, size_bytes=1000):
    scratch = DeviceScratch.__new__(DeviceScratch)
    scratch._device, scratch._driver = device, driver_of(device)
    scratch.offsets, scratch.size_bytes = {"slot": 0}, size_bytes
    values = []
    scratch.launch([], stream, values)
    return values[0]

def in_threads(count, work):
    threads = [threading.Thread(target=work, args=[i]) for i in range(count)]
    [t.start() for t in threads], [t.join() for t in threads]
"""


@pytest.fixture(params=["amd", "nvidia"], scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a program on a fake platform, and checks that it succeeds."""
    folder = tmp_path_factory.mktemp("fake")
    return fake_gpu.runner(folder, request.param, prelude=PRELUDE + SCRATCH)


def test_the_memory_of_a_threads_own_stream_ends_with_the_thread(run: Run) -> None:
    run("""
        _, first, second = start()
        own, barrier = {}, threading.Barrier(8)
        def work(i):
            own[i] = address(first, OWN)
            assert address(first, OWN) == own[i] != address(second, OWN)
            barrier.wait()  # all of them are alive
            assert fake.allocations() == 16
            barrier.wait()
        for _ in range(20):
            in_threads(8, work)
            assert len(set(own.values())) == 8
            gc.collect()
            assert fake.allocations() == 0, fake.allocations()
    """)


def test_threads_share_the_memory_of_other_streams(run: Run) -> None:
    run("""
        _, first, _ = start()
        shared = set()
        in_threads(8, lambda i: shared.add(address(first, 0)))
        assert len(shared) == fake.allocations() == 1
        assert address(first, 0, 4000) and fake.allocations() == 1, "the smaller piece is freed"
    """)
