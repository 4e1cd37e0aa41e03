"""C++ expressions for the integers of sub-blocks, from the positions of their bits in a block."""

from q4jit.weights.formats import FactorBits, SubFactors


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
