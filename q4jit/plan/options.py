"""Options of a plan, which the caller chooses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan. None leaves a choice to the schedule.

    Attributes:
        precision: `f32`, `f16` or `i8`, an upper bound of the error.
        block_size: threads per block on a GPU.
        schedule: how products are computed, by the back end's name for it.
        layout: the order of the weights' bytes, by its name; `gguf` means not repacked.
    """

    precision: str = "f32"
    block_size: int | None = None
    schedule: str | None = None
    layout: str | None = None
