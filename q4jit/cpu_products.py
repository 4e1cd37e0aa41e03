"""Products, dot products and dequantising in LLVM IR, from the description of a block format.

No weight is ever stored as a float: blocks are decoded in registers, 16 weights at a time. In the
`interleaved16` layout those are one element of 16 columns; in GGUF rows, 16 elements of a column.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from q4jit.formats import Format, Plane
from q4jit.layouts import CACHE_LINE_BYTES, LANES, Interleaved
from q4jit.llvm_text import (
    INTS,
    MASK,
    ONE,
    SIXTEEN,
    VECTOR,
    Function,
    Lanes,
    Loop,
    Module,
    float_text,
    half_loader,
    load_vector,
    splat,
    splat_value,
    store_vector,
    tail_mask,
)

CHUNK: Final = 16  # elements along K that share one shift and one scale
_WORD: Final = 4  # bytes of a quant word: elements that are decoded from one load
# far enough ahead to hide memory's latency, near enough to stay in the first-level cache
_PREFETCH_BYTES: Final = 8192
# sums that run side by side, so that few rows still fill the pipeline of the multiply-add units
_CHAINS: Final = 4


@dataclass(frozen=True)
class Product:
    """16 columns of a weight times `rows` rows of x that lie `x_stride` floats apart.

    `early_scale` multiplies every element by its scale before anything is summed. It serves weights
    with Inf or NaN among their scales: those then come out where IEEE arithmetic puts them.
    """

    weight: Interleaved
    rows: int
    x_stride: int
    early_scale: bool

    @property
    def name(self) -> str:
        """The function's name."""
        weight = self.weight
        early = "_early" if self.early_scale else ""
        return f"{weight.fmt.name.lower()}_k{weight.k}_rows{self.rows}{early}"


def add_product(module: Module, product: Product) -> str:
    """Add the function `void (ptr x, ptr w, ptr tile)` and return its name.

    x: f32 rows of padded_k floats; w: a group of 16 columns; tile: f32 [rows, 16], overwritten.
    """
    if not module.knows(product.name):
        rows = "1 row" if product.rows == 1 else f"{product.rows} rows"
        f = Function(
            f"internal void @{product.name}(ptr noalias %x, ptr noalias %w, ptr noalias %tile) #0",
            f"16 columns of {product.weight.fmt.name}, one a lane, times {rows} of x;"
            f" K = {product.weight.k}.\n"
            f"{_describe_tiles(product.weight)}; rows of x lie {product.x_stride} floats apart.",
        )
        _write_product(module, f, product)
        module.add(product.name, f)
    return f"@{product.name}"


def _describe_tiles(weight: Interleaved) -> str:
    blocks = "1 block" if weight.blocks_per_tile == 1 else f"{weight.blocks_per_tile} blocks"
    return (
        f"{weight.tiles} tiles of {weight.tile_bytes} bytes, each {blocks} of "
        f"{weight.block_elements} elements"
    )


def _write_product(module: Module, f: Function, product: Product) -> None:
    rows, chains = range(product.rows), max(1, _CHAINS // product.rows)
    early = product.early_scale or product.weight.fmt.m_offset_bytes is not None
    multiply_add = _multiply_add(module)

    def element(k: str, byte: int, value: str, parts: Loop) -> None:
        if byte == 0:
            f.comment("x[k … k+3] times four weights of every column")
        for r in rows:
            name = f"part{r}.{byte % chains}"
            at = f.at("%x", "float", f.index("k", (k, 1), (r * product.x_stride + byte, 1)), "xk")
            parts[name] = f.let(
                name,
                f"call {VECTOR} {multiply_add}({VECTOR} {parts[name]}, ptr {at}, {VECTOR} {value})",
            )

    def fold(scale: str | None, parts: Loop, totals: Loop) -> None:
        f.comment("sum by blocks: short sums keep the rounding error small")
        for r in rows:
            part = parts[f"part{r}.0"]
            for c in range(1, chains):
                part = f.let("part", f"fadd {VECTOR} {part}, {parts[f'part{r}.{c}']}")
            name, late = f"acc{r}", None if early else scale
            totals[name] = _add_scaled(module, f, name, totals[name], late, part)

    totals = _walk_group(
        module,
        f,
        product.weight,
        early=early,
        totals=[f"acc{r}" for r in rows],
        parts=[f"part{r}.{c}" for r in rows for c in range(chains)],
        element=element,
        fold=fold,
    )
    for r in rows:
        row = f.at("%tile", VECTOR, r, "tile_row")
        f.do(f"store {VECTOR} {totals[f'acc{r}']}, ptr {row}, align 64")
    f.do("ret void")


def _multiply_add(module: Module) -> str:
    name = "multiply_add"
    if not module.knows(name):
        f = Function(
            f"internal {VECTOR} @{name}({VECTOR} %sum, ptr %x, {VECTOR} %weights) #1",
            "sum + x·weights, one x for all 16 columns.",
        )
        x = splat_value(f, "float", f.let("x0", "load float, ptr %x, align 4"))
        total = _add_scaled(module, f, "total", "%sum", x, "%weights")
        f.do(f"ret {VECTOR} {total}")
        module.add(name, f)
    return f"@{name}"


def add_dequantize(module: Module, weight: Interleaved) -> str:
    """Add the function `void (ptr w, ptr out, i64 column)` and return its name.

    w: a group of 16 columns; out: f32 [K, N], of which columns `column`, … are written.
    """
    name = f"{weight.fmt.name.lower()}_dequantize"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %w, ptr noalias %out, i64 %column) #0",
            f"16 columns of {weight.fmt.name} [{weight.k}, {weight.n}] as floats.",
        )
        mask = tail_mask(f, "%column", weight.n)

        def element(k: str, byte: int, value: str, parts: Loop) -> None:
            row = f.index("k", (k, 1), (byte, 1))
            at = f.at("%out", "float", f.index("at", (row, weight.n), ("%column", 1)))
            inside = mask
            if weight.padded_k != weight.k:
                known = f.let("known", f"icmp slt i64 {row}, {weight.k}")
                lanes = splat_value(f, "i1", known)
                inside = lanes if mask is None else f.let("both", f"and {MASK} {mask}, {lanes}")
            store_vector(module, f, value, at, inside)

        _walk_group(module, f, weight, True, [], [], element, lambda scale, parts, totals: None)
        f.do("ret void")
        module.add(name, f)
    return f"@{name}"


def _walk_group(
    module: Module,
    f: Function,
    weight: Interleaved,
    early: bool,
    totals: list[str],
    parts: list[str],
    element: Callable[[str, int, str, Loop], None],
    fold: Callable[[str | None, Loop, Loop], None],
) -> Loop:
    """Write the loops over a group of 16 columns at %w: tile, block, sub-block, chunk, word.

    element(k, byte, value, parts) is called for each of the four elements of a word, value being
    the decoded weight where `early`, else the quant without its scale; fold(scale, parts, totals)
    at the end of a sub-block. totals and parts name vectors that start at zero.
    """
    fmt, block_elements = weight.fmt, weight.block_elements
    zeros = dict.fromkeys(totals, (VECTOR, "zeroinitializer"))
    chunks = fmt.scale_elements // CHUNK
    with f.loop("tile", 0, weight.tiles, carry=zeros) as tile:
        tile_at = f.at("%w", "i8", f.index("offset", (tile.index, weight.tile_bytes)), "tile_at")
        outer = {name: (VECTOR, tile[name]) for name in totals}
        with f.loop("block", 0, weight.blocks_per_tile, carry=outer, unroll=True) as block:
            fields = _Fields(module, f, weight, tile_at, block.index)
            d, m = fields.halves("d"), fields.halves("m")  # one load: a lane is a column
            inner = {name: (VECTOR, block[name]) for name in totals}
            # a format with many sub-blocks stays a loop: unrolled, Q6_K compiles for seconds
            with f.loop("sub", 0, block_elements // fmt.scale_elements, carry=inner) as sub:
                _prefetch(module, f, weight, tile_at, block.index, sub.index)
                scale = fields.scale(d, sub.index)
                fresh = dict.fromkeys(parts, (VECTOR, "zeroinitializer"))
                with f.loop("chunk", 0, chunks, carry=fresh, unroll=True) as chunk:
                    number = f.index("number", (sub.index, chunks), (chunk.index, 1))
                    words = {name: (VECTOR, chunk[name]) for name in parts}
                    planes = fields.planes(number)
                    with f.loop("word", 0, CHUNK // _WORD, carry=words, unroll=True) as word:
                        k = f.index(
                            "k",
                            (tile.index, weight.blocks_per_tile * block_elements),
                            (block.index, block_elements),
                            (number, CHUNK),
                            (word.index, _WORD),
                        )
                        for byte, quant in enumerate(fields.quants(planes, number, word.index)):
                            value = _value(module, f, quant, scale, m) if early else quant
                            element(k, byte, value, word)
                    chunk.values = dict(word.values)
                fold(scale, chunk, sub)
            block.values = dict(sub.values)
        tile.values = dict(block.values)
    return tile


def _value(module: Module, f: Function, quant: str, scale: str | None, m: str | None) -> str:
    if scale is None:
        return quant
    if m is None:
        return f.let("value", f"fmul {VECTOR} {scale}, {quant}")
    return _add_scaled(module, f, "value", m, scale, quant)


def _add_scaled(
    module: Module, f: Function, hint: str, total: str, scale: str | None, part: str
) -> str:
    """total + scale·part; scale is None where there is none or `part` carries it already."""
    if scale is None:
        return f.let(hint, f"fadd {VECTOR} {total}, {part}")
    fma = module.fma()
    return f.let(hint, f"call {VECTOR} {fma}({VECTOR} {scale}, {VECTOR} {part}, {VECTOR} {total})")


def _prefetch(
    module: Module, f: Function, weight: Interleaved, tile_at: str, block: str, sub: str
) -> None:
    block_bytes = weight.tile_bytes // weight.blocks_per_tile
    subs = weight.block_elements // weight.fmt.scale_elements
    lines = -(-block_bytes // (subs * CACHE_LINE_BYTES))
    module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    f.comment(f"the same place {_PREFETCH_BYTES} bytes ahead")
    with f.loop("line", 0, lines, unroll=True) as line:
        ahead = f.index(
            "ahead",
            (block, block_bytes),
            (sub, lines * CACHE_LINE_BYTES),
            (line.index, CACHE_LINE_BYTES),
            (_PREFETCH_BYTES, 1),
        )
        at = f.at(tile_at, "i8", ahead, "ahead_at")
        f.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 3, i32 1) ; read, keep, data")


@dataclass(frozen=True)
class _PlaneAt:
    """A plane's words of one chunk: their address and how far to shift (0 where never)."""

    address: str
    shift: str


@dataclass(frozen=True)
class _Fields:
    """Reads the fields of one block of 16 interleaved columns."""

    module: Module
    f: Function
    weight: Interleaved
    tile_at: str
    block: str

    def _address(self, name: str) -> str:
        start, stride = self.weight.offset_bytes(name)
        return self.f.at(
            self.tile_at, "i8", self.f.index(f"{name}_at", (self.block, stride), (start, 1)), name
        )

    def halves(self, name: str) -> str | None:
        """The 16 columns' d or m; None where the format has none."""
        fmt = self.weight.fmt
        if (fmt.d_offset_bytes if name == "d" else fmt.m_offset_bytes) is None:
            return None
        loader = half_loader(self.module, SIXTEEN)
        return self.f.let(f"{name}16", f"call {VECTOR} {loader}(ptr {self._address(name)})")

    def scale(self, d: str | None, sub: str) -> str | None:
        """d, or d times the scale of sub-block `sub` where the format has such scales."""
        if self.weight.fmt.scales_offset_bytes is None:
            return d
        f = self.f
        at = f.at(self._address("scales"), "i8", f.index("sub_at", (sub, LANES)), "scale_at")
        scale = f.let("s8", f"load <16 x i8>, ptr {at}, align 1")
        wide = f.let("s32", f"sext <16 x i8> {scale} to {INTS}")
        number = f.let("s", f"sitofp {INTS} {wide} to {VECTOR}")
        return f.let("scale", f"fmul {VECTOR} {d}, {number}")

    def planes(self, chunk: str) -> list[_PlaneAt]:
        """Where the quants of chunk number `chunk` of the block lie, plane by plane."""
        found = []
        for i, plane in enumerate(self.weight.fmt.planes):
            byte, shift = _plane_position(self.f, plane, self.weight.block_elements, chunk)
            base = self._address(f"quants{i}")
            address = self.f.at(base, "i8", self.f.index("byte", (byte, LANES)), "plane")
            found.append(_PlaneAt(address, shift))
        return found

    def quants(self, planes: list[_PlaneAt], chunk: str, word: str) -> list[str]:
        """The four elements of a word as floats, each in 16 columns."""
        f = self.f
        if self.weight.fmt.float_dtype is not None:
            return self._floats(chunk, word)
        words = []
        for plane in planes:
            at = f.at(plane.address, INTS, word, "word_at")
            bits = f.let("bits", f"load {INTS}, ptr {at}, align 32")
            words.append(_shift_right(f, bits, plane.shift))
        convert = _quant_converter(self.module, self.weight.fmt)
        result = []
        for byte in range(_WORD):
            shifted = [_shift_right(f, bits, str(8 * byte)) for bits in words]
            operands = ", ".join(f"{INTS} {bits}" for bits in shifted)
            result.append(f.let(f"q{byte}", f"call {VECTOR} {convert}({operands})"))
        return result

    def _floats(self, chunk: str, word: str) -> list[str]:
        f, fmt = self.f, self.weight.fmt
        result = []
        for byte in range(_WORD):
            number = f.index("number", (chunk, CHUNK), (word, _WORD), (byte, 1))
            offset = f.index("value_at", (number, LANES * fmt.block_bytes))
            at = f.at(self._address("values"), "i8", offset, "at")
            result.append(_load_floats(self.module, f, fmt, SIXTEEN, at, fmt.block_bytes))
        return result


def _load_floats(
    module: Module, f: Function, fmt: Format, lanes: Lanes, at: str, align_bytes: int
) -> str:
    if fmt.float_dtype == "<f4":
        return f.let("weight", f"load {lanes.f32}, ptr {at}, align {align_bytes}")
    loader = half_loader(module, lanes, align_bytes)
    return f.let("weight", f"call {lanes.f32} {loader}(ptr {at})")


def _plane_position(f: Function, plane: Plane, block_elements: int, chunk: str) -> tuple[str, str]:
    """The first byte of chunk number `chunk` in a plane, and its shift (see `Plane.position`)."""
    per_run, per_width = plane.run_elements // CHUNK, plane.width_bytes // CHUNK
    runs = block_elements // plane.run_elements
    if chunk == "0":
        return "0", "0"
    run = f.let("run", f"udiv i64 {chunk}, {per_run}") if runs > 1 else "0"
    within = f.let("within", f"urem i64 {chunk}, {per_run}") if runs > 1 else chunk
    column = f.let("column", f"urem i64 {within}, {per_width}") if per_width > 1 else "0"
    byte = f.index("byte", (run, plane.width_bytes), (column, CHUNK))
    if per_run == per_width:
        return byte, "0"
    pile = f.let("pile", f"udiv i64 {within}, {per_width}") if per_width > 1 else within
    narrow = f.let("pile32", f"trunc i64 {pile} to i32")
    return byte, f.let("shift", f"mul i32 {narrow}, {plane.bits}")


def _shift_right(f: Function, bits: str, shift: str) -> str:
    if shift == "0":
        return bits
    lanes = splat("i32", shift) if shift.isdigit() else splat_value(f, "i32", shift)
    return f.let("bits", f"lshr {INTS} {bits}, {lanes}")


def _quant_converter(module: Module, fmt: Format) -> str:
    """The function from the planes' bits (what stands above an element is ignored) to q − zero."""
    name = f"quant_{fmt.name.lower()}"
    if not module.knows(name):
        operands = ", ".join(f"{INTS} %bits{i}" for i in range(len(fmt.planes)))
        f = Function(f"internal {VECTOR} @{name}({operands}) #1", f"{fmt.name}: bits to q − zero.")
        one_nibble = len(fmt.planes) == 1 and fmt.planes[0].bits == 4
        if one_nibble and module.target.has("avx512f"):
            _convert_by_table(module, f, fmt)
        else:
            _convert_by_arithmetic(f, fmt)
        module.add(name, f)
    return f"@{name}"


def _convert_by_table(module: Module, f: Function, fmt: Format) -> None:
    # vpermps looks at the low four bits of a lane only: mask, subtraction and conversion in one
    table = ", ".join(f"float {float_text(q - fmt.zero)}" for q in range(16))
    permute = "llvm.x86.avx512.permvar.sf.512"
    module.declare(f"declare {VECTOR} @{permute}({VECTOR}, {INTS})")
    q = f.let("q", f"call {VECTOR} @{permute}({VECTOR} <{table}>, {INTS} %bits0)")
    f.do(f"ret {VECTOR} {q}")


def _convert_by_arithmetic(f: Function, fmt: Format) -> None:
    q = ""
    if fmt.signed:
        top = f.let("top", f"shl {INTS} %bits0, {splat('i32', '24')}")
        q = f.let("q", f"ashr {INTS} {top}, {splat('i32', '24')}")
    else:
        for i, plane in enumerate(fmt.planes):
            mask = splat("i32", str((1 << plane.bits) - 1))
            field = f.let("field", f"and {INTS} %bits{i}, {mask}")
            if plane.lshift:
                field = f.let("field", f"shl {INTS} {field}, {splat('i32', str(plane.lshift))}")
            q = f.let("q", f"or {INTS} {q}, {field}") if q else field
        if fmt.zero:
            q = f.let("q", f"sub {INTS} {q}, {splat('i32', str(fmt.zero))}")
    f.do(f"ret {VECTOR} {f.let('value', f'sitofp {INTS} {q} to {VECTOR}')}")


# --- one column straight from its GGUF row ----------------------------------------------------


def add_dot(module: Module, fmt: Format, k: int, early_scale: bool) -> str:
    """Add the function `float (ptr x, ptr row)` and return its name.

    x: K floats; row: the GGUF row of one column, at any alignment.
    """
    early = early_scale or fmt.m_offset_bytes is not None
    name = f"{fmt.name.lower()}_k{k}_dot{'_early' if early_scale else ''}"
    if not module.knows(name):
        f = Function(
            f"internal float @{name}(ptr noalias %x, ptr noalias %row) #0",
            f"x · one column of {fmt.name} with K = {k}, 16 elements at a time.",
        )
        if fmt.float_dtype is not None:
            total = _float_dot(module, f, fmt, k)
        else:
            total = _block_dot(module, f, fmt, k, early)
        f.do(f"ret float {total}")
        module.add(name, f)
    return f"@{name}"


def _block_dot(module: Module, f: Function, fmt: Format, k: int, early: bool) -> str:
    zero = (VECTOR, "zeroinitializer")
    with f.loop("block", 0, k // fmt.block_elements, carry={"acc": zero}) as block:
        at = f.at("%row", "i8", f.index("offset", (block.index, fmt.block_bytes)), "block_at")
        fields = _RowFields(module, f, fmt, at)
        d, m = fields.half("d", fmt.d_offset_bytes), fields.half("m", fmt.m_offset_bytes)
        subs, chunks = fmt.block_elements // fmt.scale_elements, fmt.scale_elements // CHUNK
        inner = {"acc": (VECTOR, block["acc"])}
        with f.loop("sub", 0, subs, carry=inner, unroll=True) as sub:
            scale = fields.scale(d, sub.index)
            with f.loop("chunk", 0, chunks, carry={"part": zero}, unroll=True) as chunk:
                number = f.index("number", (sub.index, chunks), (chunk.index, 1))
                quants = fields.quants(number)
                value = _value(module, f, quants, scale, m) if early else quants
                k_at = f.index("k", (block.index, fmt.block_elements), (number, CHUNK))
                x = load_vector(module, f, f.at("%x", "float", k_at, "xk"), None)
                chunk["part"] = _add_scaled(module, f, "part", chunk["part"], x, value)
            late = None if early else scale
            sub["acc"] = _add_scaled(module, f, "acc", sub["acc"], late, chunk["part"])
        block["acc"] = sub["acc"]
    return sum_lanes(module, f, block["acc"])


def add_row(module: Module, fmt: Format, k: int) -> str:
    """Add the function `void (ptr row, ptr out)` and return its name.

    row: a GGUF row, at any alignment; out: f32 [K], overwritten with its values.
    """
    name = f"{fmt.name.lower()}_k{k}_row"
    if not module.knows(name):
        f = Function(
            f"internal void @{name}(ptr noalias %row, ptr noalias %out) #0",
            f"A row of {fmt.name} with K = {k} as floats, 16 elements at a time.",
        )
        if fmt.float_dtype is not None:
            _float_row(module, f, fmt, k)
        else:
            _block_row(module, f, fmt, k)
        f.do("ret void")
        module.add(name, f)
    return f"@{name}"


def _block_row(module: Module, f: Function, fmt: Format, k: int) -> None:
    with f.loop("block", 0, k // fmt.block_elements) as block:
        at = f.at("%row", "i8", f.index("offset", (block.index, fmt.block_bytes)), "block_at")
        fields = _RowFields(module, f, fmt, at)
        d, m = fields.half("d", fmt.d_offset_bytes), fields.half("m", fmt.m_offset_bytes)
        subs, chunks = fmt.block_elements // fmt.scale_elements, fmt.scale_elements // CHUNK
        with f.loop("sub", 0, subs) as sub:
            scale = fields.scale(d, sub.index)
            with f.loop("chunk", 0, chunks, unroll=True) as chunk:
                number = f.index("number", (sub.index, chunks), (chunk.index, 1))
                value = _value(module, f, fields.quants(number), scale, m)
                k_at = f.index("k", (block.index, fmt.block_elements), (number, CHUNK))
                store_vector(module, f, value, f.at("%out", "float", k_at, "out_at"), None)


def _float_row(module: Module, f: Function, fmt: Format, k: int) -> None:
    whole = k // CHUNK * CHUNK
    with f.loop("k", 0, whole, step=CHUNK) as loop:
        offset = f.index("offset", (loop.index, fmt.block_bytes))
        w = _load_floats(module, f, fmt, SIXTEEN, f.at("%row", "i8", offset, "w_at"), align_bytes=1)
        store_vector(module, f, w, f.at("%out", "float", loop.index, "out_at"), None)
    with f.loop("rest", whole, k) as rest:
        offset = f.index("offset", (rest.index, fmt.block_bytes))
        w = _load_floats(module, f, fmt, ONE, f.at("%row", "i8", offset, "w_at"), align_bytes=1)
        f.do(f"store float {w}, ptr {f.at('%out', 'float', rest.index, 'out_at')}, align 4")


@dataclass(frozen=True)
class _RowFields:
    """Reads the fields of one block of a GGUF row, 16 elements at a time."""

    module: Module
    f: Function
    fmt: Format
    block_at: str

    def half(self, name: str, offset_bytes: int | None) -> str | None:
        """The block's d or m in every lane; None where the format has none."""
        if offset_bytes is None:
            return None
        f = self.f
        loader = half_loader(self.module, ONE, align_bytes=1)
        at = f.at(self.block_at, "i8", offset_bytes, f"{name}_at")
        return splat_value(f, "float", f.let(name, f"call float {loader}(ptr {at})"))

    def scale(self, d: str | None, sub: str) -> str | None:
        """d, or d times the scale of sub-block `sub` where the format has such scales."""
        if self.fmt.scales_offset_bytes is None:
            return d
        f = self.f
        offset = f.index("sub_at", (sub, 1), (self.fmt.scales_offset_bytes, 1))
        s8 = f.let("s8", f"load i8, ptr {f.at(self.block_at, 'i8', offset, 'scale_at')}")
        s = f.let("s", f"sitofp i8 {s8} to float")
        return f.let("scale", f"fmul {VECTOR} {d}, {splat_value(f, 'float', s)}")

    def quants(self, chunk: str) -> str:
        """The 16 elements of chunk number `chunk` of the block, without their scale."""
        f, operands = self.f, []
        for plane in self.fmt.planes:
            byte, shift = _plane_position(f, plane, self.fmt.block_elements, chunk)
            offset = f.index("bytes_at", (byte, 1), (plane.offset_bytes, 1))
            at = f.at(self.block_at, "i8", offset, "plane")
            narrow = f.let("bytes", f"load <16 x i8>, ptr {at}, align 1")
            bits = f.let("bits", f"zext <16 x i8> {narrow} to {INTS}")
            operands.append(f"{INTS} {_shift_right(f, bits, shift)}")
        convert = _quant_converter(self.module, self.fmt)
        return f.let("q", f"call {VECTOR} {convert}({', '.join(operands)})")


def _float_dot(module: Module, f: Function, fmt: Format, k: int) -> str:
    whole = k // CHUNK * CHUNK
    with f.loop("k", 0, whole, step=CHUNK, carry={"acc": (VECTOR, "zeroinitializer")}) as loop:
        offset = f.index("offset", (loop.index, fmt.block_bytes))
        at = f.at("%row", "i8", offset, "w_at")
        w = _load_floats(module, f, fmt, SIXTEEN, at, align_bytes=1)
        x = load_vector(module, f, f.at("%x", "float", loop.index, "xk"), None)
        loop["acc"] = _add_scaled(module, f, "acc", loop["acc"], x, w)
    total, fma = sum_lanes(module, f, loop["acc"]), module.fma("float")
    with f.loop("rest", whole, k, carry={"total": ("float", total)}) as rest:
        at = f.at("%row", "i8", f.index("offset", (rest.index, fmt.block_bytes)), "w_at")
        w = _load_floats(module, f, fmt, ONE, at, align_bytes=1)
        x = f.let("x1", f"load float, ptr {f.at('%x', 'float', rest.index, 'xk')}, align 4")
        sum_ = rest["total"]
        rest["total"] = f.let("total", f"call float {fma}(float {x}, float {w}, float {sum_})")
    return rest["total"]


def sum_lanes(module: Module, f: Function, value: str) -> str:
    """The sum of 16 lanes, as a tree."""
    module.declare(f"declare float @llvm.vector.reduce.fadd.v16f32(float, {VECTOR})")
    return f.let(
        "sum", f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, {VECTOR} {value})"
    )
