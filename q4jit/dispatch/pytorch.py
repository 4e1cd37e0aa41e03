"""Where `q4jit.torch` joins the dispatcher, which never imports PyTorch itself.

Importing `q4jit.torch` sets `bridge`. Before that, tensors that track gradients are refused, and
PyTorch's compiler cannot trace a call.
"""

from typing import Any, Protocol


class Bridge(Protocol):
    """Decides which calls run as an operator of PyTorch, and runs them."""

    def is_traced(self) -> bool:
        """Return whether PyTorch's compiler traces the caller."""
        ...

    def with_weights(self, args: tuple[Any, ...], names: tuple[str, ...]) -> tuple[Any, ...]:
        """Return the arguments of a call with a tensor of q4jit in place of each `Weight`.

        names: of the parameters. Without a `Weight`, the same tuple is returned. Raises
        ArgumentError for weights and tensors on several devices.
        """
        ...

    def with_modules(self, result: Any, given: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        """Return the result of a call with the `Weight` in place of each tensor that stands for it.

        args: what `with_weights` made of the arguments `given`.
        """
        ...

    def needs_operator(self, args: tuple[Any, ...]) -> bool:
        """Return whether gradients, autocasting or a mode of PyTorch concern a call."""
        ...

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Return the results of a call that runs as an operator of PyTorch."""
        ...


bridge: Bridge | None = None
