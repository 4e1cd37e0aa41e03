"""The request of a build: weights, GPUs and numbers of rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from q4jit.errors import GGUFError, expected
from q4jit.frontend.specs import WeightSpec
from q4jit.plan.options import PlanOptions
from q4jit.targets import Target
from q4jit.tools.text import counted
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.formats import FORMATS
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.tensor import QuantizedTensor


@dataclass(frozen=True)
class BuildRequest:
    """The kernels that a build contains.

    Attributes:
        weights: the weights to multiply by, each with the names of the tensors of a file that have
            this shape and format.
        targets: AMD GPUs.
        rows: numbers of rows M to support; empty for every M.
        plan_options: precision, block size and layout of the kernels.
        generic: build the kernels that take M, N and K at each launch.
        left_out: names of the tensors of a file that get no kernel, each with the reason.
    """

    weights: Mapping[WeightSpec, tuple[str, ...]]
    targets: tuple[Target, ...]
    rows: tuple[int, ...] = ()
    plan_options: PlanOptions = field(default_factory=PlanOptions)
    generic: bool = False
    left_out: Mapping[str, str] | None = None


def weights_in(path: str) -> tuple[dict[WeightSpec, tuple[str, ...]], dict[str, str]]:
    """Return the weights of a GGUF file by shape and format, and the matrices that are left out.

    The matrices of an expert tensor are weights like others, under the tensor's name.
    Raises GGUFError for a damaged file and for one without a matrix in a block format, and OSError.
    """
    weights: dict[WeightSpec, tuple[str, ...]] = {}
    left_out = {}
    with load_gguf(path) as file:
        for name, entry in file.tensors.items():
            if entry.rank < 2:
                continue
            if not entry.readable:  # an unsupported format, for example; the others are valid
                left_out[name] = entry.problem
                continue
            tensor = file[name]
            assert isinstance(tensor, QuantizedTensor | ExpertTensor)  # by its rank
            if FORMATS[tensor.format].float_type is not None:
                left_out[name] = f"{tensor.format} is not a block format"
                continue
            matrices = tensor if isinstance(tensor, ExpertTensor) else (tensor,)
            for spec in dict.fromkeys(map(_spec, matrices)):
                weights[spec] = (*weights.get(spec, ()), name)
    if not weights:
        formats = ", ".join(f.name for f in FORMATS.values() if f.float_type is None)
        others = counted(len(left_out), "matrix", "matrices") + " in other formats"
        raise GGUFError(
            expected(f"a matrix in {formats}", others if left_out else "no matrix", where=path)
        )
    return weights, left_out


def _spec(w: QuantizedTensor) -> WeightSpec:
    # built kernels round no weight to f16: weights that differ only in this share them
    return replace(WeightSpec(*w.signature), suits_f16=True)
