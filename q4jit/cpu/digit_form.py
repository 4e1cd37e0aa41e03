"""The form of x in digits: the types of its units in LLVM IR, and what products need of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from q4jit.cpu.dots import DotInstruction
from q4jit.cpu.llvm_text import Function, Struct, StructField
from q4jit.cpu.schedule import UNIT, CpuKernel, CpuPlan, is_integer, zero_of
from q4jit.weights.formats import Format
from q4jit.weights.layouts import LANES

HALVES: Final = UNIT // LANES
"""A unit has two halves of 16 elements: its vectors, and the smaller sub-blocks of formats."""
DIGIT_BITS: Final = 8
LARGEST: Final = {1: 127.0, 3: 8355700.0}
"""The largest X, by digits.

One digit is at most 127, three are at most 127·256² + 127·256 + 127 = 8355711. The sum of products
of 32 such X with quants of 4 bits fits int32.
"""
_SUMS_LOG2: Final = 3  # −8 · sum of 32 X fits int32; 8 is the zero of Q4_0

ROW_END: Final = Struct(
    "RowEnd",
    "What follows the units of a row.",
    (
        StructField("rough_count", "i32", "number of rough units, which digits cannot hold"),
        StructField("smallest_step", "float", "step of lift 0"),
        StructField("rough_units", "[0 x i32]", "numbers of the rough units"),
    ),
)


@dataclass(frozen=True)
class DigitForm:
    """What products need of x in digits.

    Attributes:
        digits: the digits of each element.
        half_sums: whether products need the sums of half units.
        top_sums: whether products need the sums of the highest digit.
        float_sums: whether products need sums as floats.
        balanced: whether the rounding errors of each half of a unit cancel each other.
        sums_log2: sums of X are stored times −2^sums_log2, because most products need them times
            the zero of their codes. They count modulo 2^32.
    """

    digits: int
    half_sums: bool
    top_sums: bool
    float_sums: bool
    balanced: bool = False
    sums_log2: int = _SUMS_LOG2

    @property
    def unit(self) -> Struct:
        """The type of a unit of x."""
        comment = f"{UNIT} elements of x that share a step: integers X = x / step, in digits."
        factor, of_halves, of_top = (
            1 << self.sums_log2,
            f"[{HALVES} x i32]",
            "for the highest digit",
        )
        if self.digits == 1:
            sums = StructField("sum", "float", "sum of X · 2^lift")
            note = "the same for each half of the unit"
            second = StructField("scaled_half_sums", f"[{HALVES} x float]", note)
        else:
            sums = StructField("low_sum", "float", "sum of X without the highest digit")
            second = StructField("top_half_sums", of_halves, f"the same {of_top}")
        note = f"−{factor} · sum of X, of each half of the unit"
        fields = (
            StructField("lift", "i32", "lift, at the position of a float's exponent"),
            sums,
            StructField("half_sums", of_halves, note),
            second,
            StructField("whole_sum", "i32", f"−{factor} · sum of X"),
            StructField("top_sum", "i32", f"the same {of_top}"),
            StructField(
                "digits", f"[{self.digits} x [{UNIT} x i8]]", "the digits, the highest first"
            ),
        )
        return Struct("Unit", comment, fields)


def form_of(plan: CpuPlan, kernel: CpuKernel) -> DigitForm:
    """Return the form of x that serves all integer products of a kernel, which has some."""
    assert kernel.dot is not None, "a kernel without integer products"
    formats = [
        plan.weight(product.arg).block_format
        for section in kernel.work.sections
        for product in section.products
        if is_integer(plan, kernel, section, product)
    ]
    digits = kernel.digits
    return DigitForm(
        digits,
        half_sums=any(fmt.sub_block_elements < UNIT for fmt in formats),
        top_sums=any(is_apart(fmt, digits) for fmt in formats),
        float_sums=any(fmt.minimum_at is not None for fmt in formats),
        balanced=digits == 1 and any(fmt.sub_minima is not None for fmt in formats),
        sums_log2=_sums_log2(formats, digits, kernel.dot.instruction),
    )


def _sums_log2(formats: Sequence[Format], digits: int, instruction: DotInstruction) -> int:
    """Return the factor of sums of X, as a power of two: it divides the zeros of all codes."""
    zeros = [zero for fmt in formats if (zero := zero_of(fmt, instruction))]
    factors = [(zero & -zero).bit_length() - 1 for zero in zeros]
    if digits > 1 and any(fmt.minimum_at is not None for fmt in formats):
        factors.append(_SUMS_LOG2)  # minima are multiplied by these sums: they must fit
    return min(factors, default=_SUMS_LOG2)


def fits(fmt: Format, digits: int) -> bool:
    """Return whether int32 holds the exact sum of a sub-block with all digits of X."""
    return fmt.sub_block_elements * fmt.largest_number * LARGEST[digits] < 1 << 31


def is_apart(fmt: Format, digits: int) -> bool:
    """Return whether the highest digit has a sum of its own.

    It has one if all digits would overflow, and beside a minimum: a sum of all digits would be
    rounded before the minimum is added, which may cancel it.
    """
    return digits > 1 and (fmt.minimum_at is not None or not fits(fmt, digits))


def load_field(
    f: Function, unit_at: str, struct: Struct, name: str, *indices: str | int, kind: str = "i32"
) -> str:
    """Load four bytes of a unit: a field, or what `indices` select in it."""
    at = f.field_at(unit_at, struct, name, *indices)
    return f.let(name, f"load {kind}, ptr {at}, align 4")
