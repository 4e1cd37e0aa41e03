"""Tensor parallelism: styles that divide modules among processes, for `parallelize_module`.

    parallelize_module(feed_forward, mesh, {
        "gate": ColwiseLinear(),
        "up": ColwiseLinear(),
        "down": RowwiseLinear(),
    })

They work like `ColwiseParallel` and `RowwiseParallel` of PyTorch. A process keeps its part of each
weight, in the layout of its device, and kernels run on tensors of the process. `DTensor`s exist
only where the layouts of inputs, outputs or gradients ask for communication.
"""

import sys
from typing import Any, ClassVar, Final, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from q4jit.errors import ArgumentError, expected
from q4jit.torch.modules import Linear
from q4jit.torch.shards import Axis, check_divides, own_part, own_weight, take, take_blocks
from q4jit.torch.weight import Weight

__all__ = ["ColwiseLinear", "RowwiseLinear"]

_ALL: Final = (Replicate(),)
_LAST_AXIS: Final = (Shard(-1),)
_SUMMANDS: Final = (Partial(),)


class _Style(ParallelStyle):
    """What the styles share.

    Attributes:
        module: the class of modules that it divides.
        axis: of the weight, along which it is divided.
        bias_dim: of the bias, along which it is divided; None if each process has all of it.
        takes, gives: the layouts of input and output without communication.
        input_gradient: the layout of the gradient for the input; None is that of the input.
        instead: what to do if the axis cannot be divided.
    """

    module: ClassVar[type[nn.Module]]
    axis: ClassVar[Axis]
    bias_dim: ClassVar[int | None] = None
    takes: ClassVar[tuple[Placement]] = _ALL
    gives: ClassVar[tuple[Placement]] = _LAST_AXIS
    input_gradient: ClassVar[tuple[Placement] | None] = _SUMMANDS
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
        self._check_module(module, where)
        assert isinstance(module, Linear)
        check_divides(module.weight, self.axis, device_mesh.size(), where, self.instead)
        size = module.weight.K, module.weight.N
        _Division(self, device_mesh, size, where).divide(module)
        return module

    def _check_module(self, module: nn.Module, where: str) -> None:
        if not isinstance(module, self.module):
            what, got = f"a q4jit.torch.{self.module.__name__}", _class(module)
            if isinstance(module, nn.Linear | nn.Embedding):
                style = type(self).__name__.replace(self.module.__name__, "Parallel")
                cure = f"use torch.distributed.tensor.parallel.{style}, or replace_linears first"
            else:
                cure = "name the modules in it, as in {'mlp.up': " + f"{type(self).__name__}()}}"
            raise ArgumentError(expected(what, got, where=where, cure=cure))
        if getattr(module, _DIVISION, None) is not None:
            cure = "name it once in the plan"
            raise ArgumentError(expected("a whole module", "a part of one", where=where, cure=cure))

        if Partial() in self.output_layouts and getattr(module, "bias", None) is not None:
            cure = "add the bias outside of the module"
            what, got = "a module without bias for summands as output", "one with bias"
            raise ArgumentError(expected(what, got, where=where, cure=cure))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class ColwiseLinear(_Style):
    """Divide the outputs of a `Linear`, and its bias: each process has a part of N.

    Its input is whole on every process and its output divided along the last axis, unless the
    layouts say otherwise. An N that the number of processes does not divide gives the last process
    less. The gradient for the input is added up over the processes. Raises ArgumentError, which
    names the module, for another module, and for a mesh that cannot be used.
    """

    module = Linear
    axis = "N"
    bias_dim = 0


class RowwiseLinear(_Style):
    """Divide the inputs of a `Linear`: each process has a part of K, in whole blocks.

    Its input is divided along the last axis, as `ColwiseLinear` leaves it, and its output added up
    over the processes, unless the layouts say otherwise. The bias is whole on every process and
    added once. Raises ArgumentError as `ColwiseLinear` does, and for a K that does not give each
    process whole blocks.
    """

    module = Linear
    axis = "K"
    takes = _LAST_AXIS
    gives = _SUMMANDS
    input_gradient = None
    instead = ", ColwiseLinear()"


# --- a divided module -----------------------------------------------------------------------------

_DIVISION: Final = "_division"


class _Division:
    """How a module is divided. It is never changed.

    Attributes:
        style, mesh: among which processes, and how.
        k, n: the size of the whole weight.
        where: the module, for errors.
    """

    def __init__(self, style: _Style, mesh: DeviceMesh, size: tuple[int, int], where: str) -> None:
        self.style = style
        self.mesh = mesh
        self.k, self.n = size
        self.where = where

    def divide(self, module: Linear) -> None:
        """Give a module this process's part of its weight and bias, and hooks that communicate."""
        source = self.style.src_data_rank
        weight = own_weight(module.weight, self.style.axis, self.mesh, source)
        if isinstance(module, Linear):
            if module.bias is not None:
                own = own_part(module.bias.detach(), self.style.bias_dim, self.mesh, source)
                module.bias = nn.Parameter(own, requires_grad=module.bias.requires_grad)
            module.in_features, module.out_features = weight.K, weight.N
            module._adds_bias = self.style.gives != _SUMMANDS
        module.weight = weight
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after)
        module.register_load_state_dict_pre_hook(self.before_load)  # type: ignore[no-untyped-call]
        setattr(module, _DIVISION, self)

    def before(self, module: Linear, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a call with the input as the kernels need it."""
        x, *rest = args
        style = self.style
        if not isinstance(x, DTensor):
            if not isinstance(x, Tensor) or self._fits(x, module.weight.K):
                return args
            x = DTensor.from_local(x, self.mesh, style.input_layouts, run_check=False)
        x = x.redistribute(placements=style.takes)
        return x.to_local(grad_placements=style.input_gradient), *rest

    def _fits(self, x: Tensor, k: int) -> bool:
        """Return whether neither an input nor its gradient has to be communicated."""
        style = self.style
        if style.input_layouts != style.takes:
            return False
        if style.takes == _LAST_AXIS and x.shape[-1:] == (self.k,) != (k,):
            got, cure = f"[..., {self.k}]", "use input_layouts=Replicate() if x is not divided"
            what = f"[..., {k}], this process's part of x"
            raise ArgumentError(expected(what, got, where=self.where, cure=cure))
        return style.input_gradient is None or not (torch.is_grad_enabled() and x.requires_grad)

    def after(self, module: Linear, args: tuple[Any, ...], y: Tensor) -> Any:
        """Return the output of a call in the layout of the style."""
        style = self.style
        if style.use_local_output and style.output_layouts == style.gives:
            return y
        whole: Any = self._whole(y)
        whole = whole.redistribute(placements=style.output_layouts)
        if not module._adds_bias and module.bias is not None:
            bias: Tensor = module.bias
            if torch.is_autocast_enabled(y.device.type):
                bias = bias.to(y.dtype)  # as the kernels do
            whole = whole + DTensor.from_local(bias, self.mesh, _ALL, run_check=False)
        return whole.to_local() if style.use_local_output else whole

    def _whole(self, y: Tensor) -> DTensor:
        """Return the output of all processes."""
        shape = stride = None
        if self.style.gives == _LAST_AXIS and self.n % self.mesh.size():
            # parts of different widths: `DTensor` cannot infer the sum
            *lead, width = y.shape
            shape = torch.Size((*lead, self.n))
            stride = (*[step // width * self.n for step in y.stride()[:-1]], 1)
        return DTensor.from_local(
            y, self.mesh, self.style.gives, run_check=False, shape=shape, stride=stride
        )

    def before_load(self, module: Linear, state: dict[str, Any], prefix: str, *_: object) -> None:
        """Put this process's parts in place of the entries of a state of the whole module."""
        weight, style = module.weight, self.style
        key = f"{prefix}weight.{weight.format}"
        blocks = state.get(key)
        if isinstance(blocks, Tensor) and blocks.dim() == 2 and self._is_whole(blocks, weight):
            state[key] = take_blocks(blocks, weight, style.axis, self.mesh)
        bias = state.get(f"{prefix}bias")
        if isinstance(bias, Tensor) and style.bias_dim is not None and bias.shape == (self.n,):
            state[f"{prefix}bias"] = take(bias, style.bias_dim, self.mesh)

    def _is_whole(self, blocks: Tensor, weight: Weight) -> bool:
        return blocks.shape == (self.n, weight.stored.block_format.column_bytes(self.k))

    def __deepcopy__(self, memo: object) -> "_Division":
        return self

    def __reduce__(self) -> NoReturn:
        """Raise ArgumentError: the processes exist only now."""
        raise ArgumentError(
            "a module that is divided among processes cannot be pickled; save module.state_dict()"
        )


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
