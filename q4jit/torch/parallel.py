"""Tensor parallelism: styles that divide modules among processes, for `parallelize_module`.

    parallelize_module(feed_forward, mesh, {
        "gate": ColwiseLinear(),
        "up": ColwiseLinear(),
        "down": RowwiseLinear(),
    })

They work like `ColwiseParallel` and `RowwiseParallel` of PyTorch. A process keeps its part of each
weight, in the layout of its device, and kernels run on tensors of the process. `DTensor`s exist
only where the layouts of inputs, outputs or gradients ask for communication.

The state of a divided module has this process's blocks and bias under the keys of the whole module,
as plain tensors: save one file per process. `load_state_dict` takes it, or the state of the whole.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from q4jit.errors import ArgumentError, expected
from q4jit.torch.modules import Embedding, Linear
from q4jit.torch.shards import Axis, check_divides, own_entry, own_part, own_weight, take
from q4jit.torch.weight import Weight

__all__ = ["ColwiseEmbedding", "ColwiseLinear", "FusedParallel", "RowwiseLinear"]

Layout = tuple[Placement]

_ALL: Final = (Replicate(),)
_LAST_AXIS: Final = (Shard(-1),)
_SUMMANDS: Final = (Partial(),)
_COLUMNS: Final[Mapping[str, Axis]] = {"weight": "N"}
_BLOCKS: Final[Mapping[str, Axis]] = {"weight": "K"}
_DIVISION: Final = "_division"


class _Style(ParallelStyle):
    """What the styles share.

    Attributes:
        axes: of the weights that are divided, by the attributes of the module.
        takes, gives: the layouts of input and output without communication.
        input_layouts, output_layouts: those that the user wants.
    """

    axes: Mapping[str, Axis]
    takes: Layout = _ALL
    gives: Layout = _LAST_AXIS
    instead: ClassVar[str] = ""

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        """Keep the layouts; the arguments are those of PyTorch's styles.

        input_layouts: how an input that is no `DTensor` is divided. output_layouts: how the output
        shall be. use_local_output: return this process's tensor instead of a `DTensor`.
        """
        super().__init__()
        self.input_layouts = self.takes if input_layouts is None else (input_layouts,)
        default = _ALL if self.gives == _SUMMANDS else self.gives
        self.output_layouts = default if output_layouts is None else (output_layouts,)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        where = f"{type(self).__name__} of {_name(module)}"
        _check_mesh(device_mesh, where)
        self._check(module, where)
        if hasattr(module, _DIVISION):
            cure = "name it once in the plan"
            raise ArgumentError(expected("a whole module", "a part of one", where=where, cure=cure))
        for name, axis in self.axes.items():
            weight = getattr(module, name)
            check_divides(weight, axis, device_mesh.size(), where, self.instead)
        self._divide(module, _Division(self, module, device_mesh, where))
        return module

    def _check(self, module: nn.Module, where: str) -> None:
        """Raise ArgumentError unless the style suits a module."""
        raise NotImplementedError

    def _divide(self, module: nn.Module, division: "_Division") -> None:
        """Give a module this process's parts, and hooks that communicate."""
        for name, axis in self.axes.items():
            whole = getattr(module, name)
            setattr(module, name, own_weight(whole, axis, division.mesh, self.src_data_rank))
        module.register_forward_pre_hook(division.before, with_kwargs=True)
        module.register_forward_hook(division.after)
        module.register_load_state_dict_pre_hook(division.before_load)
        setattr(module, _DIVISION, division)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class _LinearStyle(_Style):
    """What the styles for `Linear` share.

    Attributes:
        bias_dim: the axis along which the bias is divided; None if each process has all of it.
    """

    bias_dim: ClassVar[int | None]

    def _check(self, module: nn.Module, where: str) -> None:
        _check_type(module, Linear, self, where)
        if self.output_layouts == _SUMMANDS and module.bias is not None:
            what, got = "a module without bias, for outputs that are summands", "one with bias"
            cure = "add the bias outside of the module"
            raise ArgumentError(expected(what, got, where=where, cure=cure))

    def _divide(self, module: nn.Module, division: "_Division") -> None:
        super()._divide(module, division)
        assert isinstance(module, Linear)
        if module.bias is not None:
            own = own_part(module.bias.detach(), self.bias_dim, division.mesh, self.src_data_rank)
            module.bias = nn.Parameter(own, requires_grad=module.bias.requires_grad)
        module.in_features, module.out_features = module.weight.K, module.weight.N
        module._adds_bias = self.bias_dim is not None


class ColwiseLinear(_LinearStyle):
    """Divide the outputs of a `Linear`, and its bias: each process has a part of N.

    Its input is whole on every process and its output divided along the last axis, unless the
    layouts say otherwise. An N that the number of processes does not divide gives the last process
    less. The gradient for the input is added up over the processes. Raises ArgumentError, which
    names the module, for another module, and for a mesh that cannot be used.
    """

    axes = _COLUMNS
    bias_dim = 0


class RowwiseLinear(_LinearStyle):
    """Divide the inputs of a `Linear`: each process has a part of K, in whole blocks.

    Its input is divided along the last axis, as `ColwiseLinear` leaves it, and its output added up
    over the processes, unless the layouts say otherwise. The bias is whole on every process and
    added once. Raises ArgumentError as `ColwiseLinear` does, and for a K that does not give each
    process whole blocks.
    """

    axes = _BLOCKS
    takes = _LAST_AXIS
    gives = _SUMMANDS
    bias_dim = None
    instead = ", ColwiseLinear()"


class ColwiseEmbedding(_Style):
    """Divide the vectors of an `Embedding`: each process has a part of their blocks, for all ids.

    The ids are whole on every process and the output divided along the last axis, unless the
    layouts say otherwise. Raises ArgumentError as `RowwiseLinear` does.
    """

    axes = _BLOCKS

    def _check(self, module: nn.Module, where: str) -> None:
        _check_type(module, Embedding, self, where)

    def _divide(self, module: nn.Module, division: "_Division") -> None:
        super()._divide(module, division)
        assert isinstance(module, Embedding)
        module.embedding_dim = module.weight.K


class FusedParallel(_Style):
    """Divide the weights of a module whose `forward` calls one decorated function.

        class FeedForward(nn.Module):  # with Weights gate, up and down
            def forward(self, x):
                return feed_forward(x, self.gate, self.up, self.down)

        parallelize_module(model, mesh, {"mlp": FusedParallel(["gate", "up"], ["down"])})

    Each process has a part of the columns of the first weights, and of the blocks of the others
    that multiply the results. `Experts` is one of these modules. Inputs are whole on every process.
    Outputs are added up over the processes if blocks are divided, otherwise they are divided along
    the last axis, unless output_layouts says otherwise. Whatever the function does after products
    with divided blocks is done before the sum, so it must be linear, and add nothing. Inputs may be
    in lists, tuples and dicts. Raises ArgumentError as `RowwiseLinear` does, for a name that is no
    `Weight` of the module, and for a module with parameters that require gradients.
    """

    def __init__(
        self,
        columns: Sequence[str],
        blocks: Sequence[str] = (),
        *,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        """Keep names and layouts.

        columns: the weights whose N is divided. blocks: those whose K is divided. output_layouts,
        use_local_output: as in `ColwiseLinear`. Raises ArgumentError unless columns has a name.
        """
        if not columns:
            where = "columns of FusedParallel"
            raise ArgumentError(expected("the name of a weight", "none", where=where))
        self.axes = {**dict.fromkeys(columns, "N"), **dict.fromkeys(blocks, "K")}
        self.gives = _SUMMANDS if blocks else _LAST_AXIS
        super().__init__(output_layouts=output_layouts, use_local_output=use_local_output)

    def _check(self, module: nn.Module, where: str) -> None:
        for name in self.axes:
            weight = getattr(module, name, None)
            if not isinstance(weight, Weight):
                what, got = f"a Weight as attribute {name!r}", type(weight).__name__
                raise ArgumentError(expected(what, got, where=where))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                # each process would have the gradient of its part of the work
                cure = "give it to forward as an argument, or use requires_grad_(False)"
                what, got = "frozen parameters", f"{name!r}, which requires a gradient"
                raise ArgumentError(expected(what, got, where=where, cure=cure))


# --- divided modules ------------------------------------------------------------------------------


class _Division:
    """How a module is divided. It is never changed.

    Attributes:
        style, mesh: how, and among which processes.
        where: the module, for errors.
        shapes: of the whole weights.
        length: what is divided of the first weight: the width of an output that is divided.
    """

    def __init__(self, style: _Style, module: nn.Module, mesh: DeviceMesh, where: str) -> None:
        self.style = style
        self.mesh = mesh
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {
            name: getattr(module, name).shape for name in style.axes
        }
        name, axis = next(iter(style.axes.items()))
        self.length = self.shapes[name][-1 if axis == "N" else -2]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call, with tensors of this process."""
        return self._local(args), self._local(kwargs)

    def _local(self, x: Any) -> Any:
        style = self.style
        if type(x) is list or type(x) is tuple:
            return type(x)([self._local(value) for value in x])
        if type(x) is dict:
            return {key: self._local(value) for key, value in x.items()}
        if not isinstance(x, DTensor):
            if not isinstance(x, Tensor) or self._fits(x):
                return x
            x = DTensor.from_local(x, self.mesh, style.input_layouts, run_check=False)
        x = x.redistribute(placements=style.takes)
        # each process has the gradient of its part of the work
        return x.to_local(grad_placements=_SUMMANDS if style.takes == _ALL else None)

    def _fits(self, x: Tensor) -> bool:
        """Return whether neither an input nor its gradient has to be communicated.

        Raises ArgumentError for a whole input where each process should give its part.
        """
        if self.style.input_layouts != self.style.takes:
            return False
        if self.style.takes == _ALL:
            return not (torch.is_grad_enabled() and x.requires_grad)
        if x.shape[-1:] == (self.length,) and self.mesh.size() > 1:
            got, cure = f"[..., {self.length}]", "use input_layouts=Replicate() if it is whole"
            what = f"this process's part of x [..., {self.length}]"
            raise ArgumentError(expected(what, got, where=self.where, cure=cure))
        return True

    def after(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
        """Return the output of a call in the layout that the user wants.

        Raises ArgumentError for an output that is no tensor.
        """
        style = self.style
        if not isinstance(y, Tensor):
            got = type(y).__name__
            raise ArgumentError(expected("a tensor as output", got, where=self.where))
        if style.use_local_output and style.output_layouts == style.gives:
            return y
        whole: Any = self._whole(y).redistribute(placements=style.output_layouts)
        if isinstance(module, Linear) and not module._adds_bias and module.bias is not None:
            bias: Tensor = module.bias
            if torch.is_autocast_enabled(y.device.type):
                bias = bias.to(y.dtype)  # as kernels do
            whole = whole + DTensor.from_local(bias, self.mesh, _ALL, run_check=False)
        return whole.to_local() if style.use_local_output else whole

    def _whole(self, y: Tensor) -> DTensor:
        """Return the outputs of all processes as one."""
        shape = stride = None
        if self.style.gives == _LAST_AXIS and self.length % self.mesh.size():
            # parts of different widths, which `DTensor` cannot add up by itself
            *lead, width = y.shape
            shape = torch.Size((*lead, self.length))
            stride = (*[step // width * self.length for step in y.stride()[:-1]], 1)
        return DTensor.from_local(
            y, self.mesh, self.style.gives, run_check=False, shape=shape, stride=stride
        )

    def before_load(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *_: object
    ) -> None:
        """Put this process's parts in place of the entries of a state of the whole module."""
        for name, axis in self.style.axes.items():
            weight: Weight = getattr(module, name)
            key = f"{prefix}{name}.{weight.format}"
            *experts, k, n = self.shapes[name]
            shape = (*experts, n, weight.stored.block_format.column_bytes(k))
            whole = state.get(key)
            if isinstance(whole, Tensor) and whole.shape == shape:
                state[key] = own_entry(whole, weight, axis, self.mesh)
        whole = state.get(f"{prefix}bias")
        dim = getattr(self.style, "bias_dim", None)
        if isinstance(whole, Tensor) and dim is not None and whole.shape == (self.length,):
            state[f"{prefix}bias"] = take(whole, dim, self.mesh)

    def __deepcopy__(self, memo: object) -> "_Division":
        return self

    def __reduce__(self) -> NoReturn:
        """Raise ArgumentError: the processes exist only now."""
        raise ArgumentError(
            "a module that is divided among processes cannot be pickled; save module.state_dict()"
        )


# --- checks ---------------------------------------------------------------------------------------


def _check_type(module: nn.Module, kind: type[nn.Module], style: _Style, where: str) -> None:
    """Raise ArgumentError unless a module is of the class that a style is for."""
    if isinstance(module, kind):
        return
    name = type(style).__name__
    if isinstance(module, nn.Linear | nn.Embedding):
        name = name.replace(kind.__name__, "Parallel")
        cure = f"use torch.distributed.tensor.parallel.{name}, or quantise the module first"
    else:
        cure = f"name the modules in it, as in {{'mlp.up': {name}()}}"
    what = f"a q4jit.torch.{kind.__name__}"
    raise ArgumentError(expected(what, _class(module), where=where, cure=cure))


def _check_mesh(mesh: DeviceMesh, where: str) -> None:
    """Raise ArgumentError unless modules can be divided among the processes of a mesh."""
    if not distributed.is_initialized():
        cure = (
            "start the program with torchrun and call torch.distributed.init_process_group() and "
            "init_device_mesh(...)"
        )
        raise ArgumentError(expected("a process group", "none", where=where, cure=cure))
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        axis = f"mesh[{names[-1]!r}]" if names else 'mesh["tp"], with mesh_dim_names=("dp", "tp")'
        got = f"one of shape {tuple(mesh.shape)}"
        raise ArgumentError(expected("a mesh of one axis", got, where=where, cure=f"use {axis}"))
    if mesh.get_coordinate() is None:
        cure = "call parallelize_module only in the processes of the mesh"
        raise ArgumentError(expected("a process of the mesh", "another", where=where, cure=cure))


def _name(module: nn.Module) -> str:
    """Return the name of a module in the model that `parallelize_module` was called with.

    It calls itself for parts of the model, and does not tell styles where they are.
    """
    model, frame = module, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is parallelize_module.__code__:
            model = frame.f_locals.get("module", model)
    for name, part in model.named_modules():
        if part is module and name:
            return repr(name)
    return f"the {type(module).__name__}"


def _class(module: nn.Module) -> str:
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    return f"nn.{kind.__name__}" if package == "torch" else kind.__name__
