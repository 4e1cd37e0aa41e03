"""What a caller asks of the kernels of a plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanOptions:
    """Choices that a caller makes; None leaves a choice to the schedule.

    precision: `f32`, `f16` or `i8`, an upper bound of the error. block_size: threads per block of a
    GPU. schedule, layout: of the products; a back end has names for them. `gguf` is the layout of
    weights that are not repacked.
    """

    precision: str = "f32"
    block_size: int | None = None
    schedule: str | None = None
    layout: str | None = None
