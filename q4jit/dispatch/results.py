"""Results in the containers that a function returns: kernels know arrays and tuples only."""

from collections.abc import Callable, Sequence
from typing import Any

from q4jit.frontend.structures import Results
from q4jit.pipeline import DeviceLaunch, Launch


def in_containers(launch: Launch, results: Results | None) -> Launch:
    """Return a launch that puts its results into containers; None: it returns what it returned."""
    if results is None:
        return launch
    if isinstance(launch, DeviceLaunch):
        return _DeviceContainerLaunch(launch, results)
    return _ContainerLaunch(launch, results)


class _ContainerLaunch:
    """A launch whose results are leaves of containers."""

    def __init__(self, launch: Launch, results: Results) -> None:
        self._launch: Any = launch
        self._results = results

    def __call__(self, args: Sequence[Any], out: object = None) -> Any:
        """Run the kernels; return `out` if it is given, else containers of new arrays."""
        if out is None:
            return self._results.build(args, self._launch(args))
        self._launch(args, self._results.arrays(args, out))
        return out

    def bind(self, args: Sequence[Any], out: object = None) -> Callable[[], Any]:
        """Return a call with these arrays."""
        if out is not None:
            call = self._launch.bind(args, self._results.arrays(args, out))
            return lambda: (call(), out)[1]
        call = self._launch.bind(args)
        return lambda: self._results.build(args, call())

    def prepare(self, args: Sequence[Any]) -> None:
        """Make the repacked copies of the weights that the kernels read."""
        self._launch.prepare(args)


class _DeviceContainerLaunch(_ContainerLaunch):
    """The same on a GPU."""

    def on_tensors(self, args: Sequence[Any], out: Any, pointers: list[int], stream: int) -> Any:
        """Run the kernels on PyTorch tensors that an earlier call checked."""
        if out is not None:  # numbers and weights may be others than in the call that was checked
            self._results.arrays(args, out)
        made = self._launch.on_tensors(args, out, pointers, stream)
        return self._results.build(args, made) if out is None else out
