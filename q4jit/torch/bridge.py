"""Which calls of decorated functions run as the operator, and how.

PyTorch's compiler traces `TorchBridge.call`. So that function contains nothing that the compiler
cannot trace; what needs q4jit's tracer is in functions whose results are constants to the compiler.
"""

import contextlib
import operator
from typing import Any, Final

import torch
from torch.autograd import forward_ad

from q4jit.dispatcher import Specialized, positional
from q4jit.errors import ArgumentError, expected
from q4jit.frontend.containers import LEAVES, MAPPINGS, Apart, Misfit, fields_of, together
from q4jit.frontend.structures import flattened, names_of
from q4jit.torch.calls import call_of, is_text_of, refuse_devices
from q4jit.torch.guards import constant, guard, object_at
from q4jit.torch.leaves import TENSORS, Key, Leaves, holds_weight
from q4jit.torch.operator import call
from q4jit.torch.results import name_of_builder
from q4jit.torch.weight import Weight

_DIRECT: Final = frozenset({torch.Tensor, torch.nn.Parameter})
"""Tensors whose memory holds their values. Subclasses may be fakes, or distributed."""
# Functions of PyTorch's, looked up once. They are private, because only they ask for every device
# and every kind of mode at once, in a tenth of a microsecond.
_is_any_autocast_enabled: Final = torch._C._is_any_autocast_enabled
_dispatch_modes: Final = torch._C._len_torch_dispatch_stack
_transforms: Final = torch._C._functorch.peek_interpreter_stack
_is_tracing: Final = torch._C._is_tracing

_ARRAY: Final = "an array"
_TUPLE: Final = "a tuple of arrays"


class TorchBridge:
    """Implements `dispatch.pytorch.Bridge`."""

    def is_traced(self) -> bool:
        """Return whether PyTorch's compiler traces the caller."""
        return torch.compiler.is_dynamo_compiling()

    def with_weights(self, args: tuple[Any, ...], names: tuple[str, ...]) -> tuple[Any, ...]:
        """Return the arguments of a call with a tensor of q4jit in place of each `Weight`."""
        made: list[Any] = []
        devices = set()
        for value in args:
            kind = type(value)
            if kind in _DIRECT:
                # kernels of GPUs take no strides
                is_strided = value.is_cuda and not value.is_contiguous()
                made.append(value.contiguous() if is_strided else value)
                devices.add(value.get_device())
            elif isinstance(value, Weight):
                made.append(value.tensor())
                devices.add(value.blocks.get_device())
            elif kind not in LEAVES and _is_container(value):
                made.append(_with_weights(value))
                devices.add(None)
            else:
                made.append(value)
        if len(devices) > 1:
            leaves = flattened(args, names)
            refuse_devices(leaves, names_of(leaves, names))
        return args if all(map(operator.is_, args, made)) else tuple(made)

    def with_modules(self, result: Any, given: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        """Return the result of a call with the `Weight` in place of each tensor of q4jit."""
        if type(result) is torch.Tensor or not _is_container(result):
            return result
        apart = Apart()
        tree = apart.tree(result)
        if set(map(type, apart.leaves)).isdisjoint(TENSORS):
            return result
        pairs = zip(map(_leaves, args), map(_leaves, given), strict=True)
        modules = {id(w): m for made, old in pairs for w, m in zip(made, old, strict=True)}
        return together(tree, (modules.get(id(leaf), leaf) for leaf in apart.leaves))

    def needs_operator(self, args: tuple[Any, ...]) -> bool:
        """Return whether gradients, autocasting or a mode of PyTorch concern a call.

        Raises ArgumentError for tensors that PyTorch differentiates in forward mode or by
        torch.func, for which it takes no formula of a list of tensors.
        """
        transforms = _transforms() is not None
        if transforms or forward_ad._current_level >= 0:
            _refuse_transforms(args)
        if _is_any_autocast_enabled() or _dispatch_modes() or transforms or _is_tracing():
            return any(_has_tensor(v) or isinstance(v, Weight) for v in args)
        tracks = torch.is_grad_enabled()
        has_tensor = has_weight = False
        for value in args:
            kind = type(value)
            if kind in _DIRECT:
                if value.is_meta or (tracks and value.requires_grad):
                    return True
                has_tensor = True
            elif isinstance(value, Weight):
                has_weight = True
            elif kind in LEAVES:
                continue
            else:
                leaves = _leaves(value)
                if any(_is_special(leaf, tracks) for leaf in leaves):
                    return True
                has_weight = has_weight or any(isinstance(leaf, Weight) for leaf in leaves)
        # without a tensor, results would be arrays of NumPy
        return has_weight and not has_tensor and not any(map(_has_tensor, args))

    def call(
        self,
        function: Specialized[Any, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> Any:
        """Return the results of a call that runs as the operator. Raises the errors of a call."""
        if out is not None:
            _refuse_out(function._name)
        values = _positional(function, args, kwargs)
        leaves = Leaves(autocast=any(holds_weight(value) for value in values))
        pairs = zip(function._parameters, values, strict=False)  # the compiler has no strict=True
        keys = tuple([leaves.key(*pair) for pair in pairs])
        inner = leaves.inner_axis()
        text, results = _text_and_results(id(function), keys, inner)
        made = call(leaves.arrays, leaves.weights, leaves.numbers, text)
        if results == _ARRAY:
            return made[0]
        return tuple(made) if results == _TUPLE else getattr(function, results)(leaves.all, made)


def _is_special(value: Any, tracks: bool) -> bool:
    """Return whether a leaf needs the operator. tracks: whether gradients are tracked."""
    if isinstance(value, Weight):
        return value.blocks.is_meta  # the operator's shapes need no values
    if type(value) not in _DIRECT:
        return isinstance(value, torch.Tensor)
    return bool(value.is_meta or (tracks and value.requires_grad))


def _refuse_transforms(args: tuple[Any, ...]) -> None:
    """Raise ArgumentError if derivatives other than by backward calls are asked for."""
    for value in args:
        for leaf in _leaves(value):
            if not isinstance(leaf, torch.Tensor):
                continue
            tracked = torch._C._functorch.is_gradtrackingtensor(leaf)
            dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(leaf).tangent
            if tracked or isinstance(dual, torch.Tensor):
                what = "a tensor without derivatives of torch.func or of forward mode"
                got, cure = "one that has them", "use torch.autograd.grad, or y.backward()"
                raise ArgumentError(expected(what, got, cure=cure))


@constant
def _refuse_out(name: str) -> None:
    """Raise ArgumentError; PyTorch's compiler shows the message."""
    raise ArgumentError(
        f"{name}: out= cannot be combined with gradients, autocasting or torch.compile; use the "
        "result that the call returns"
    )


def _positional(
    function: Specialized[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """Return the arguments of a call in the order of the parameters."""
    values = list(args)
    if kwargs or len(args) != len(function._parameters):
        names = _names_after(id(function), len(args), tuple(kwargs))
        defaults = function._defaults
        values += [kwargs[name] if name in kwargs else defaults[name] for name in names]
    return values


@constant
def _names_after(identity: int, given: int, named: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the parameters of the function with this id, after the first `given`.

    Raises ArgumentError unless these arguments fit the parameters.
    """
    function: Specialized[Any, Any] = object_at(identity)
    positional(function, (None,) * given, dict.fromkeys(named))
    return function._parameters[given:]


@constant
def _text_and_results(identity: int, keys: tuple[Key, ...], inner: Any) -> tuple[str, str]:
    """Return the text of a call of the function with this id, and what builds its results.

    That is the name of an attribute of the function, or one of the usual results.
    """
    function: Specialized[Any, Any] = object_at(identity)
    traced = call_of(function, keys, inner)
    if function._unchanged is not None:
        _guard(function, keys, inner, traced.text)
    if isinstance(traced.results, bool):
        return traced.text, _TUPLE if traced.results else _ARRAY
    return traced.text, name_of_builder(function, traced.results)


def _guard(function: Specialized[Any, Any], keys: tuple[Key, ...], inner: Any, text: str) -> None:
    """Let the graph that is being traced hold only as long as the call has this text."""
    unchanged = function._unchanged

    def holds() -> bool:
        nonlocal unchanged
        if unchanged is None or unchanged():
            return True
        if not is_text_of(function, keys, inner, text):
            return False
        unchanged = function._unchanged  # other objects with the same values
        return True

    guard(holds, f"{function._name} reads the same globals and closures")


# --- arguments ------------------------------------------------------------------------------------


def _is_container(value: Any) -> bool:
    kind = type(value)
    return kind is list or kind is tuple or kind in MAPPINGS or fields_of(kind) is not None


def _leaves(value: Any) -> list[Any]:
    if not _is_container(value):
        return [value]
    apart = Apart()
    with contextlib.suppress(Misfit):  # the call refuses it, and names it
        apart.tree(value)
    return apart.leaves


def _with_weights(value: Any) -> Any:
    if not _is_container(value):
        return value.tensor() if isinstance(value, Weight) else value
    apart = Apart()
    try:
        tree = apart.tree(value)
    except Misfit:  # as in `_leaves`
        return value
    if not any(isinstance(leaf, Weight) for leaf in apart.leaves):
        return value
    return together(tree, map(_with_weights, apart.leaves))


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in _leaves(value))
