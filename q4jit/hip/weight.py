"""What the templates need to know of a weight, and of a product with it."""

from dataclasses import dataclass
from typing import Final

from q4jit.frontend.graph import Node
from q4jit.hip import kernel as kernels
from q4jit.hip.factors import UnitFactors
from q4jit.hip.kernel import UNIT_ELEMENTS, HipKernel
from q4jit.hip.tile_weight import TileWeight
from q4jit.hip.values import literal
from q4jit.hip.weight_facts import BYTE_ZERO, WeightFacts
from q4jit.weights.formats import Format, Plane
from q4jit.weights.layouts import PLANAR, TILES16, Planar, fields
from q4jit.weights.tiles import PANEL_COLUMNS, are_plain

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
_ROWS_OF_TILES: Final = frozenset({"value"})
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


def called_functions(kernel: HipKernel, fmt: Format) -> frozenset[str]:
    """Return the functions of a weight's struct that the template of a kernel calls."""
    has_minima = fmt.minimum_at is not None
    if kernel.schedule == kernels.LOOKUP and kernel.layout == TILES16 and not are_plain(fmt):
        return _ROWS_OF_TILES
    if kernel.schedule == kernels.GEMV_TRANSPOSED and kernel.scales_late and not has_minima:
        return _PARTS if kernel.layout == TILES16 else _UNITS_LATE
    if kernel.schedule == kernels.GEMV and kernel.scales_late:
        return _LATE
    if kernel.schedule == kernels.TILE_HALVES and kernel.folded:
        return _FOLDED
    if kernel.schedule == kernels.GEMV_DOT and fmt.sub_minima is not None:
        return _CALLED[kernels.GEMV_DOT] | {"code_of_zero"}
    return _CALLED.get(kernel.schedule, VALUES)


@dataclass(frozen=True)
class _Field:
    """A field of a block.

    Attributes:
        name: its name as a constant.
        start_bytes: where its region begins; without regions, where it begins in a block.
        size_bytes: its bytes of a block or of a unit; without regions, all bytes of a block.
        of_unit: whether a region has a part of the field for each of several units of a block.
    """

    name: str
    start_bytes: int
    size_bytes: int
    of_unit: bool = False


@dataclass(frozen=True)
class _Plane:
    """A bit field of the quants, and what is loaded of it for a unit.

    Attributes:
        number: its place among the planes.
        shape: how it is stored in the layout.
        first: its first word of 16 bytes among those of all planes.
    """

    number: int
    shape: Plane
    first: int

    @property
    def field(self) -> str:
        """The field of the block that holds it."""
        return f"QUANTS{self.number}"

    @property
    def bits(self) -> int:
        """Bits of a quant."""
        return self.shape.bits

    @property
    def width_bytes(self) -> int:
        """Bytes of a run: byte j holds elements j, j + width_bytes and so on."""
        return self.shape.width_bytes

    @property
    def run_elements(self) -> int:
        """Elements of a run."""
        return self.shape.run_elements

    @property
    def lshift(self) -> int:
        """Where its bits are in the quant."""
        return self.shape.lshift

    @property
    def is_split(self) -> bool:
        """Whether several units of a block share its bytes."""
        return self.run_elements > UNIT_ELEMENTS and self.bits != 8

    @property
    def is_in_order(self) -> bool:
        """Whether a unit is one run, or a part of one, so that words hold quants in their order."""
        return self.run_elements >= UNIT_ELEMENTS or self.bits == 8

    @property
    def unit_bytes(self) -> int:
        """The bytes that hold the quants of a unit."""
        return min(self.width_bytes, 32) if self.is_split else UNIT_ELEMENTS * self.bits // 8

    @property
    def words(self) -> int:
        """Words of 16 bytes in a unit; 0 if a unit has fewer bytes."""
        return self.unit_bytes // 16

    @property
    def small_words(self) -> int:
        """Words of 4 bytes in a unit."""
        return self.unit_bytes // 4

    @property
    def mask(self) -> str:
        """The plane's bits of a quant, in each byte of a word."""
        return f"{((1 << self.bits) - 1) * 0x01010101:#010x}u"

    @property
    def bit(self) -> str:
        """Where quant i of a unit has its lowest bit in the plane, for runs shorter than a unit."""
        if self.width_bytes == 1:
            return "i" if self.bits == 1 else f"i * {self.bits}"
        run, width = self.run_elements, self.width_bytes
        in_run = f"i % {width} * 8 + i % {run} / {width} * {self.bits}"
        return f"(i / {run} * {8 * width} + {in_run})"


@dataclass(frozen=True)
class KernelWeight(WeightFacts):
    """What `weight.hip.j2` needs to know of a weight.

    Attributes:
        layout: the order of its bytes.
        called: the functions of its struct that a kernel calls.
        k_name: the name of its K in the text. Products with `w.T` have none, as their x has N.
    """

    layout: str
    called: frozenset[str] = VALUES
    k_name: str = "K"

    @property
    def _fmt(self) -> Format:
        """The format of the blocks as they are stored in the layout."""
        fmt = self.spec.block_format
        return fmt.repacked if self.is_planar else fmt

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
        return (functions if self.has_m else functions - _OF_MINIMA) | self._helpers(functions)

    def _helpers(self, functions: frozenset[str]) -> set[str]:
        """Return the functions that unpack numbers and factors, called by `functions`."""
        unpacks = not self.is_quads and "value" in functions
        reads_factors = unpacks or (not self.is_planar and "load" in functions)
        helpers = {
            "numbers": self.table and (unpacks or "quants" in functions),
            "sub_scale": self.has_scales and reads_factors,
            "sub_minimum": self.has_minima and reads_factors,
        }
        return {name for name, is_called in helpers.items() if is_called}

    @property
    def format(self) -> str:
        """The name of its format."""
        return self.spec.format

    @property
    def is_planar(self) -> bool:
        """Whether each field of the blocks has a region of its own."""
        return self.layout in {PLANAR, TILES16}

    @property
    def is_quads(self) -> bool:
        """Whether four blocks are stored together, transposed for the lanes that share them."""
        return self.layout == TILES16

    @property
    def tiled(self) -> TileWeight:
        """What only `tiles16` needs to know of it."""
        return TileWeight(self.spec)

    @property
    def is_tiles(self) -> bool:
        """Whether its struct is that of `part/tiles.hip.j2`: in `tiles16`, and not as Q4_0."""
        return self.is_quads and not are_plain(self.spec.block_format)

    @property
    def offset_type(self) -> str:
        """The type that counts a weight's bytes: 32 bits halve the additions of a GPU."""
        shape = self.tiled.tiles if self.is_quads else Planar(self._fmt, self.k, self.n)
        return "u32" if shape.size_bytes < 1 << 32 else "u64"

    def load(self, size_bytes: int, at: int = 0) -> str:
        """Return the function that loads 4, 8 or 16 bytes of quants from byte `at` of a block."""
        if self.is_planar:
            return "stream_16" if size_bytes == 16 else f"*(const u{8 * size_bytes}*)"
        return f"load_{size_bytes}_by_{_alignment(self._fmt.block_bytes, at)}"

    @property
    def unaligned(self) -> set[tuple[int, int]]:
        """The bytes and the alignment of loads that one instruction cannot do."""
        if self.is_planar or self.float_bytes:
            return set()
        loads = ((16 if p.words else p.unit_bytes, p.shape.at) for p in self.planes)
        return {(size, _alignment(self._fmt.block_bytes, at)) for size, at in loads}

    @property
    def float_bytes(self) -> int:
        """Bytes of an element that is a float; 0 in blocks."""
        return self._fmt.block_bytes if self._fmt.float_type else 0

    @property
    def is_bf16(self) -> bool:
        """Whether elements are bf16, the upper half of an f32."""
        return self._fmt.float_type == "bf16"

    @property
    def column_bytes(self) -> int:
        """Bytes of a column of floats."""
        shape = Planar(self._fmt, self.k, self.n)
        elements = shape.blocks * shape.block_elements if self.is_planar else self.k
        return elements * self.float_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in a GGUF file."""
        return self._fmt.block_bytes

    @property
    def zero(self) -> str:
        """The number that is subtracted from a quant as it is read; empty for 0."""
        zero = self._fmt.zero + (BYTE_ZERO if self.from_minus_128 else 0)
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
    def from_minus_128(self) -> bool:
        """Whether the bytes of unpacked quants are counted from −128."""
        return self.signed or self._fmt.table is not None

    @property
    def halves(self) -> bool:
        """Whether each half of a unit has a scale, and perhaps a minimum, of its own."""
        return self._fmt.sub_block_elements < UNIT_ELEMENTS

    @property
    def factors(self) -> UnitFactors:
        """How the scales and minima of sub-blocks are stored."""
        return UnitFactors(self._fmt, self.is_planar)

    @property
    def fields(self) -> list[_Field]:
        """The fields of a block."""
        if not self.is_planar:
            stride = self._fmt.block_bytes
            return [_Field(f.name.upper(), f.at, stride) for f in fields(self._fmt)]
        if self.is_quads:
            regions = self.tiled.tiles.regions
        else:
            regions = Planar(self._fmt, self.k, self.n).regions
        units = 1 if self.is_quads or self.float_bytes else self.block_elements // UNIT_ELEMENTS
        listed = []
        for name, (start, size) in regions.items():
            of_unit = units > 1 and name not in {"d", "m"}
            listed.append(_Field(name.upper(), start, size // units if of_unit else size, of_unit))
        return listed

    @property
    def field(self) -> dict[str, _Field]:
        """The fields of a block by name."""
        return {field.name: field for field in self.fields}

    @property
    def planes(self) -> list[_Plane]:
        """The planes of bits that quants consist of."""
        planes: list[_Plane] = []
        for i, plane in enumerate(self._fmt.planes):
            planes.append(_Plane(i, plane, sum(q.words for q in planes)))
        return planes

    @property
    def words(self) -> int:
        """Loads of 16 bytes for the quants of a unit."""
        return sum(plane.words for plane in self.planes)

    @property
    def stored_registers(self) -> int:
        """Registers of a lane for a unit as it is stored, scales included."""
        if self.float_bytes:
            return 8 * self.float_bytes
        words = sum(plane.small_words for plane in self.planes)
        return words + 1 + self.has_m + self.has_scales + self.factors.has_own_minima


def _alignment(block_bytes: int, at: int) -> int:
    """Return the bytes to which a field of a file's blocks is aligned, 2 at most."""
    return 1 if block_bytes % 2 or at % 2 else 2


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
    weight: KernelWeight

    @property
    def from_start(self) -> str:
        """The text that is added to a column of a slice that does not start at column 0."""
        return f" + {self.node.start}" if self.node.start else ""

    @property
    def is_of_tiles(self) -> bool:
        """Whether the 16 columns of a panel of results are one panel of the weight."""
        return self.node.start % PANEL_COLUMNS == 0
