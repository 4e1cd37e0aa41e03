"""What the templates need to know of a weight, and of a product with it."""

from dataclasses import dataclass
from typing import Final

from q4jit.frontend.graph import Node
from q4jit.frontend.specs import WeightSpec
from q4jit.hip import kernel as kernels
from q4jit.hip.kernel import HipKernel
from q4jit.hip.values import literal
from q4jit.weights.formats import Format
from q4jit.weights.layouts import PANEL_COLUMNS, PLANAR, TILES16, Planar, fields

VALUES: Final = frozenset({"load", "decode"})
"""What a kernel calls that needs the values of whole units."""

# What the kernels of other schedules call. The struct of a weight has these functions and those
# that they call in turn; a format without minima has no functions for minima.
_QUANTS: Final = frozenset({"load", "quants", "scale", "minimum"})
_FROM_ZERO: Final = frozenset({"centred", "code_of_zero"})
_QUADS: Final = frozenset({"quad_index", "load_part", "value"})
_CALLED: Final = {
    kernels.GEMV_DOT: _QUANTS | VALUES,
    kernels.TILE_MATRIX: _QUANTS | _FROM_ZERO | VALUES,
    kernels.GEMV_MATRIX: _QUADS | {"halves", "part_scale"},
    kernels.TILE_HALVES: _QUADS | {"halves", "part_scale"},
    kernels.TILE_HALVES_TRANSPOSED: frozenset({"value", "column_pairs"}),
}
_FOLDED: Final = _QUADS | {"rounded"}
_LATE: Final = _QUANTS | _FROM_ZERO | {"value"}
# for `w.T`: a quarter of a quad, or a unit whose y is multiplied by its scale
_PARTS: Final = frozenset({"quad_index", "load_part", "part_scale", "part_quants", "centred"})
_UNITS_LATE: Final = frozenset({"load", "quants", "scale", "centred"})
_OF_FLOATS: Final = VALUES
_OF_MINIMA: Final = frozenset({"minimum", "code_of_zero"})
_CALLS: Final = {
    "decode": {"quants", "centred", "scale", "minimum"},
    "rounded": {"halves"},
    "value": {"quad_index"},
}


def called_functions(kernel: HipKernel, has_minima: bool = False) -> frozenset[str]:
    """Return the functions of a weight's struct that the template of a kernel calls."""
    if kernel.schedule == kernels.GEMV_TRANSPOSED and kernel.scales_late and not has_minima:
        return _PARTS if kernel.layout == TILES16 else _UNITS_LATE
    if kernel.schedule == kernels.GEMV and kernel.scales_late:
        return _LATE
    if kernel.schedule == kernels.TILE_HALVES and kernel.folded:
        return _FOLDED
    return _CALLED.get(kernel.schedule, VALUES)


@dataclass(frozen=True)
class _Field:
    """A field of a block.

    Attributes:
        name: its name as a constant.
        start_bytes: where its region begins; without regions, where it begins in a block.
        size_bytes: its bytes of a block; without regions, all bytes of a block.
    """

    name: str
    start_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class _Plane:
    """A bit field of the quants, and its words of 16 bytes in a unit.

    Attributes:
        field: the field of the block that holds it.
        bits: of a quant.
        width_bytes: byte j of a run of this length holds elements j, j + width_bytes, …
        run_elements: elements of a run.
        lshift: where its bits are in the quant.
        first: its first word among those of all planes.
    """

    field: str
    bits: int
    width_bytes: int
    run_elements: int
    lshift: int
    first: int

    @property
    def words(self) -> int:
        """Words of 16 bytes in a unit."""
        return 1 if self.width_bytes == 16 else 2

    @property
    def is_split(self) -> bool:
        """Whether the units of a block share its bytes."""
        return self.width_bytes != 16 and self.bits != 8

    @property
    def mask(self) -> str:
        """The plane's bits of a quant, in each byte of a word."""
        return f"{((1 << self.bits) - 1) * 0x01010101:#010x}u"


@dataclass(frozen=True)
class Weight:
    """What `weight.hip.j2` needs to know of a weight.

    Attributes:
        spec: its format and shape.
        layout: the order of its bytes.
        called: the functions of its struct that a kernel calls.
        k_name: the name of its K in the text. Products with `w.T` have none, as their x has N.
    """

    spec: WeightSpec
    layout: str
    called: frozenset[str] = VALUES
    k_name: str = "K"

    @property
    def _fmt(self) -> Format:
        return self.spec.block_format

    @property
    def name(self) -> str:
        """The struct that decodes it."""
        return f"{self.format}_{self.k}x{self.n}"

    @property
    def functions(self) -> frozenset[str]:
        """The functions that its struct has: what a kernel calls, and what these call."""
        if self.float_bytes:
            return self.called & _OF_FLOATS
        functions = self.called.union(*(_CALLS.get(name, ()) for name in self.called))
        if not self.is_quads:
            functions -= {"quad_index"}
        elif "load" in functions:
            functions |= {"quad_index"}
        return functions if self.has_m else functions - _OF_MINIMA

    @property
    def format(self) -> str:
        """The name of its format."""
        return self.spec.format

    @property
    def k(self) -> int:
        """Elements of a column."""
        return self.spec.k

    @property
    def n(self) -> int:
        """Columns."""
        return self.spec.n

    @property
    def is_planar(self) -> bool:
        """Whether each field of the blocks has a region of its own."""
        return self.layout in {PLANAR, TILES16}

    @property
    def is_quads(self) -> bool:
        """Whether four blocks are stored together, transposed for the lanes that share them."""
        return self.layout == TILES16

    @property
    def offset_type(self) -> str:
        """The type that counts a weight's bytes: 32 bits halve the additions of a GPU."""
        total = Planar(self._fmt, self.k, self.n, tiled=self.is_quads).size_bytes
        return "u32" if total < 1 << 32 else "u64"

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the matrix of an expert, and so from one expert to the next."""
        if not self.is_planar:
            return self.n * self._fmt.column_bytes(self.k)
        return Planar(self._fmt, self.k, self.n, tiled=self.is_quads).size_bytes

    @property
    def load(self) -> str:
        """The function that loads 16 bytes of quants."""
        return "stream_16" if self.is_planar else "load_16_by_2"

    @property
    def float_bytes(self) -> int:
        """Bytes of an element that is a float; 0 in blocks."""
        return self._fmt.block_bytes if self._fmt.float_dtype else 0

    @property
    def column_bytes(self) -> int:
        """Bytes of a column of floats."""
        shape = Planar(self._fmt, self.k, self.n)
        elements = shape.blocks * shape.block_elements if self.is_planar else self.k
        return elements * self.float_bytes

    @property
    def block_elements(self) -> int:
        """Elements of a block."""
        return self._fmt.block_elements

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in a GGUF file."""
        return self._fmt.block_bytes

    @property
    def zero(self) -> str:
        """The number that is subtracted from a quant as it is read; empty for 0."""
        # signed quants are read as bytes counted from −128
        zero = self._fmt.zero + (128 if self._fmt.signed else 0)
        return literal(zero) if zero else ""

    @property
    def byte_zero(self) -> int:
        """The quant of the value 0, where quants are signed bytes."""
        return self._fmt.zero

    @property
    def largest(self) -> str:
        """The largest quant."""
        return literal((1 << self._fmt.quant_bits) - 1)

    @property
    def signed(self) -> bool:
        """Whether quants are signed."""
        return self._fmt.signed

    @property
    def has_m(self) -> bool:
        """Whether blocks have a minimum."""
        return self._fmt.minimum_at is not None

    @property
    def has_scales(self) -> bool:
        """Whether blocks have scales of sub-blocks."""
        return self._fmt.sub_scales_at is not None

    @property
    def fields(self) -> list[_Field]:
        """The fields of a block."""
        if self.is_planar:
            regions = Planar(self._fmt, self.k, self.n, tiled=self.is_quads).regions
            return [_Field(name.upper(), start, size) for name, (start, size) in regions.items()]
        stride = self._fmt.block_bytes
        return [_Field(f.name.upper(), f.at, stride) for f in fields(self._fmt)]

    @property
    def field(self) -> dict[str, _Field]:
        """The fields of a block by name."""
        return {field.name: field for field in self.fields}

    @property
    def planes(self) -> list[_Plane]:
        """The planes of bits that quants consist of."""
        planes: list[_Plane] = []
        for i, p in enumerate(self._fmt.planes):
            shape = p.bits, p.width_bytes, p.run_elements, p.lshift
            planes.append(_Plane(f"QUANTS{i}", *shape, sum(q.words for q in planes)))
        return planes

    @property
    def words(self) -> int:
        """Loads of 16 bytes for the quants of a unit."""
        return sum(plane.words for plane in self.planes)

    @property
    def stored_registers(self) -> int:
        """Registers of a lane for a unit as it is stored, scales included."""
        loads = 2 * self.float_bytes or self.words
        return 4 * loads + (self.float_bytes == 0) + self.has_m + self.has_scales


@dataclass(frozen=True)
class Product:
    """What the templates need to know of a product.

    Attributes:
        node: the product in the graph.
        name: what variables of the product begin with: its weight's name (`gate_sums`).
        result: the variable of its result (`gate_product`).
        argument: the parameter of its weight.
        weight: its weight.
    """

    node: Node
    name: str
    result: str
    argument: str
    weight: Weight

    @property
    def from_start(self) -> str:
        """The text that is added to a column of a slice that does not start at column 0."""
        return f" + {self.node.start}" if self.node.start else ""

    @property
    def is_of_tiles(self) -> bool:
        """Whether the 16 columns of a panel of results are one panel of the weight."""
        return self.node.start % PANEL_COLUMNS == 0
