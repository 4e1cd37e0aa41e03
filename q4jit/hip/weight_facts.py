"""What the templates need to know of a weight in every layout."""

from dataclasses import dataclass

from q4jit.frontend.specs import WeightSpec
from q4jit.hip.kernel import UNIT_ELEMENTS
from q4jit.weights.formats import Format

BYTE_ZERO = 128
"""What is added to the numbers of a table, so that bytes are unsigned."""
_TABLE_NUMBERS = 16


@dataclass(frozen=True)
class WeightFacts:
    """What repacking does not change.

    Attributes:
        spec: its format and shape.
    """

    spec: WeightSpec

    @property
    def _file(self) -> Format:
        """The format of the blocks as a file has them."""
        return self.spec.block_format

    @property
    def k(self) -> int:
        """Elements of a column."""
        return self.spec.k

    @property
    def n(self) -> int:
        """Columns."""
        return self.spec.n

    @property
    def block_elements(self) -> int:
        """Elements of a block."""
        return self._file.block_elements

    @property
    def table(self) -> list[str]:
        """The numbers of a format with a table as bytes counted from −128, four to a word."""
        if self._file.table is None:
            return []
        missing = _TABLE_NUMBERS - len(self._file.table)
        numbers = [number + BYTE_ZERO for number in self._file.table] + [0] * missing
        words = (numbers[i : i + 4] for i in range(0, _TABLE_NUMBERS, 4))
        return [f"{int.from_bytes(word, 'little'):#010x}u" for word in words]

    @property
    def has_m(self) -> bool:
        """Whether blocks have a minimum."""
        return self._file.minimum_at is not None

    @property
    def has_scales(self) -> bool:
        """Whether sub-blocks have scales."""
        return self._file.sub_scales is not None

    @property
    def has_minima(self) -> bool:
        """Whether sub-blocks have minima."""
        return self._file.sub_minima is not None

    @property
    def unit_sub_blocks(self) -> int:
        """The sub-blocks of a unit."""
        return UNIT_ELEMENTS // self._file.sub_block_elements

    @property
    def is_e8m0(self) -> bool:
        """Whether the scale of a block is an exponent, E8M0."""
        return self._file.scale_type == "e8m0"
