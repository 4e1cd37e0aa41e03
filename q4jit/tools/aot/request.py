"""What a build is asked for: weights, GPUs, numbers of rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from q4jit.errors import GGUFError
from q4jit.frontend.specs import WeightSpec
from q4jit.plan.options import PlanOptions
from q4jit.targets import Target
from q4jit.tools.text import counted
from q4jit.weights.formats import FORMATS
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.tensor import QuantizedTensor


@dataclass(frozen=True)
class BuildRequest:
    """What a build is to contain.

    weights: what x is multiplied by, each with the tensors of a file that it stands for. targets:
    GPUs of AMD. rows: numbers of rows M that must be served; none of them means every M. generic:
    the plain interface, whose kernels take M, N and K at run time. left_out: tensors of a file that
    get no kernel, and why.
    """

    weights: Mapping[WeightSpec, tuple[str, ...]]
    targets: tuple[Target, ...]
    rows: tuple[int, ...] = ()
    plan_options: PlanOptions = field(default_factory=PlanOptions)
    generic: bool = False
    left_out: Mapping[str, str] | None = None


def weights_in(path: str) -> tuple[dict[WeightSpec, tuple[str, ...]], dict[str, str]]:
    """The weights of a GGUF file, by shape and format, and what else has two dimensions.

    Raises GGUFError for a damaged file and for one without a matrix in a block format, and OSError.
    """
    found: dict[WeightSpec, tuple[str, ...]] = {}
    left_out = {}
    with load_gguf(path) as file:
        for name in file:
            try:
                tensor = file[name]
            except GGUFError as error:  # of another format; the rest of the file is sound
                left_out[name] = str(error)
                continue
            if not isinstance(tensor, QuantizedTensor):
                continue
            if tensor.block_format.float_dtype is not None:
                left_out[name] = f"{tensor.format} is no block format"
                continue
            # what is built rounds no weights
            spec = replace(WeightSpec(*tensor.signature), suits_f16=True)
            found[spec] = (*found.get(spec, ()), name)
    if not found:
        formats = ", ".join(f.name for f in FORMATS.values() if f.float_dtype is None)
        raise GGUFError(
            f"{path}: found no weight among {counted(len(left_out), 'matrix', 'matrices')}; "
            f"accepted are tensors of two dimensions in {formats}"
        )
    return found, left_out
