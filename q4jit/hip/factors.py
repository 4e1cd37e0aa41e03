"""The integers of sub-blocks as C++ expressions, from the positions of their bits in a block."""

from dataclasses import dataclass

from q4jit.weights.formats import FactorBits, Format, SubFactors
from q4jit.weights.layouts import fields


@dataclass(frozen=True)
class UnitFactors:
    """The scales and minima of a unit's sub-blocks, as kernels load them.

    In regions of their own they have a byte each, or share one. Those of a file's blocks become an
    int8 each when they are loaded.

    Attributes:
        fmt: the format of the blocks as they are stored.
        in_regions: whether each field of the blocks has a region of its own.
    """

    fmt: Format
    in_regions: bool

    @property
    def minima_field(self) -> str:
        """The name of the field that has the minima."""
        names = {field.name for field in fields(self.fmt)}
        return "minima" if "minima" in names else "scales"

    @property
    def has_own_minima(self) -> bool:
        """Whether a loaded unit has minima, and not in the bytes of its scales."""
        has_field = not self.in_regions or self.minima_field == "minima"
        return self.fmt.sub_minima is not None and has_field

    @property
    def subtracts_minima(self) -> bool:
        """Whether the minimum of a sub-block is subtracted."""
        return self.fmt.sub_minima is not None and self.fmt.sub_minima.negative

    @property
    def sub_scale(self) -> str:
        """The scale of sub-block `j` of a block, from its field `scales`."""
        return self._of_block(self.fmt.sub_scales, "scales")

    @property
    def sub_minimum(self) -> str:
        """The minimum of sub-block `j` of a block, from the field `minima_field`."""
        return self._of_block(self.fmt.sub_minima, self.minima_field)

    def _of_block(self, sub: SubFactors | None, name: str) -> str:
        assert sub is not None, "a factor of a format without it"
        (origin,) = (field.at for field in fields(self.fmt) if field.name == name)
        return factor_expression(sub, self.fmt.sub_blocks, name, origin)

    def of(self, name: str, half: str) -> str:
        """Return the integer of a sub-block of the unit `stored`.

        name: `scales` or `minima`. half: which half of the unit, empty if it is one sub-block.
        """
        if not self.in_regions:
            return f"stored.{name}[{half}]" if half else f"stored.{name}"
        sub = self.fmt.sub_scales if name == "scales" else self.fmt.sub_minima
        assert sub is not None, "a factor of a format without it"
        (part,) = sub.parts
        shifts = [f"8 * {half}"] if half else []
        shifts += [str(part.shift)] if part.shift else []
        bits = f"stored.{name if name == 'scales' or self.has_own_minima else 'scales'}"
        bits = f"{bits} >> ({' + '.join(shifts)})" if shifts else bits
        if part.bits == 8:
            return f"(i8)({bits})" if shifts else f"(i8){bits}"
        field = f"({bits} & {(1 << part.bits) - 1})"
        return f"({field} - {sub.zero})" if sub.zero else field


def factor_expression(sub: SubFactors, count: int, array: str, origin: int) -> str:
    """Return the factor of sub-block `j`, without the sign of `negative` factors.

    count: the sub-blocks of a block. array: the name of a `const u8*`. origin: which byte of the
    block it points to.
    """
    fields = [_field(part, count, array, origin) for part in sub.parts]
    if len(fields) > 1:
        fields = [f"({field})" for field in fields]
    shifted = [
        f"{field} << {part.lshift}" if part.lshift else field
        for field, part in zip(fields, sub.parts, strict=True)
    ]
    stored = " | ".join(shifted)
    is_plain = len(sub.parts) == 1 and sub.bits == 8
    if sub.signed:
        stored = f"(i8){stored}" if is_plain else f"(i8)({stored})"
    if not sub.zero:
        return stored
    return f"({stored}) - {sub.zero}"


def _field(part: FactorBits, count: int, array: str, origin: int) -> str:
    """Return the bits of sub-block `j` in one part."""
    byte = _stepped(part.at - origin, part.byte_steps, part.columns, count)
    shift = _stepped(part.shift, part.shift_steps, part.columns, count)
    if part.bits == 8:
        return f"{array}[{byte}]"
    mask = (1 << part.bits) - 1
    if shift == "0":
        return f"{array}[{byte}] & {mask}"
    return f"{array}[{byte}] >> {shift if shift.isdigit() else f'({shift})'} & {mask}"


def _stepped(start: int, steps: tuple[int, int], columns: int, count: int) -> str:
    """Return a number that grows in steps with the column and the row of sub-block `j`."""
    column = "j" if count <= columns else f"j % {columns}"
    row = f"j / {columns}" if count > columns else ""
    terms = [str(start)] if start else []
    for index, step in zip((column, row), steps, strict=True):
        if step and index:
            terms.append(f"{index} * {step}" if step > 1 else index)
    return " + ".join(terms) or "0"
