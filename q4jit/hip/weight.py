"""What the templates need to know of a weight and of a product with it."""

from dataclasses import dataclass

from q4jit.frontend.graph import Node
from q4jit.frontend.specs import WeightSpec
from q4jit.hip.values import literal
from q4jit.weights.formats import Format
from q4jit.weights.layouts import LANES, PLANAR, TILES16, Planar, fields


@dataclass(frozen=True)
class _Field:
    name: str
    start_bytes: int
    stride_bytes: int


@dataclass(frozen=True)
class _Plane:
    """first, words: where its 16-byte words of a unit stand among those of all planes."""

    field: str
    bits: int
    width_bytes: int
    run_elements: int
    lshift: int
    first: int

    @property
    def words(self) -> int:
        return 1 if self.width_bytes == 16 else 2

    @property
    def is_split(self) -> bool:
        """Whether the units of a block share its bytes."""
        return self.width_bytes != 16 and self.bits != 8

    @property
    def mask(self) -> str:
        return f"{((1 << self.bits) - 1) * 0x01010101:#010x}u"


@dataclass(frozen=True)
class Weight:
    """What `weight.hip.j2` needs to know of a weight."""

    spec: WeightSpec
    layout: str

    @property
    def _fmt(self) -> Format:
        return self.spec.block_format

    @property
    def name(self) -> str:
        """The struct that decodes it."""
        return f"{self.format}_{self.k}x{self.n}"

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
        """Whether four blocks stand together, transposed for the lanes that share them."""
        return self.layout == TILES16

    @property
    def offset_type(self) -> str:
        """What counts a weight's bytes: with 32 bits a GPU needs half of the additions."""
        total = Planar(self._fmt, self.k, self.n, tiled=self.is_quads).size_bytes
        return "u32" if total < 1 << 32 else "u64"

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
    def zero(self) -> str:
        """What is subtracted from a quant as it is read."""
        # signed quants are read as bytes counted from −128
        return literal(self._fmt.zero + (128 if self._fmt.signed else 0))

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
        return self._fmt.m_offset_bytes is not None

    @property
    def has_scales(self) -> bool:
        """Whether blocks have scales of sub-blocks."""
        return self._fmt.scales_offset_bytes is not None

    @property
    def fields(self) -> list[_Field]:
        """Where the fields of a block lie, and how far apart."""
        if self.is_planar:
            regions = Planar(self._fmt, self.k, self.n, tiled=self.is_quads).regions
            return [_Field(name, start, size) for name, (start, size) in regions.items()]
        stride = self._fmt.block_bytes
        return [_Field(f.name, f.source_bytes, stride) for f in fields(self._fmt)]

    @property
    def planes(self) -> list[_Plane]:
        """The planes of bits that quants are put together from."""
        planes: list[_Plane] = []
        for i, p in enumerate(self._fmt.planes):
            shape = p.bits, p.width_bytes, p.run_elements, p.lshift
            planes.append(_Plane(f"QUANTS{i}", *shape, sum(q.words for q in planes)))
        return planes

    @property
    def words(self) -> int:
        """Loads of 16 bytes for the quants of a unit."""
        return sum(plane.words for plane in self.planes)


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
        return self.node.start % LANES == 0
