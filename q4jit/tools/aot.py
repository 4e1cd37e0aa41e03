"""Ahead-of-time builds: plain products as files that a native program launches without Python.

A build is one folder: for each kernel its HIP text and its code object, `manifest.json`, which says
everything that a launch needs, and the C header `q4jit_kernels.h` with the same as a table. The
same request gives the same bytes. A product is one launch or two: where its schedule wants to know
the rows of x first, a kernel goes before it and hands scratch buffers on.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from q4jit.compilers import cache
from q4jit.compilers.codeobject import KernelInfo, kernel_infos, unpacker
from q4jit.compilers.find import HipCompiler, find_compiler
from q4jit.errors import ArgumentError, FormatError, GGUFError
from q4jit.frontend.specs import WeightSpec, array_spec
from q4jit.frontend.trace import trace
from q4jit.hip.classes import MANY_ROWS, m_class
from q4jit.hip.kernel import (
    MAX_GRID_Y,
    Grid,
    HipKernel,
    HipPlan,
    grid,
)
from q4jit.hip.limits import check_block_size
from q4jit.hip.memory import scratch
from q4jit.hip.render import render, render_generic
from q4jit.hip.schedule import make_plan
from q4jit.hip.values import parameters
from q4jit.plan.kernels import Source
from q4jit.plan.options import Tuning
from q4jit.targets import Target
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.gguf.file import load_gguf
from q4jit.weights.layouts import (
    GGUF,
    INTERLEAVED16,
    LANES,
    PLANAR,
    Interleaved,
    Planar,
    fields,
    pack,
)
from q4jit.weights.tensor import QuantizedTensor

MANIFEST: Final = "manifest.json"
HEADER: Final = "q4jit_kernels.h"
LAYOUTS: Final = (PLANAR, GGUF, INTERLEAVED16)
_BLOCK_SIZE: Final = 256  # of the generic kernels
_ROLES: Final = {"array": "x", "weight": "weights", "output": "y", "m": "M"}  # by a slot's kind
_C_TYPES: Final = {
    "i8": "signed char",
    "i16": "short",
    "i32": "int",
    "i64": "long long",
    "u8": "unsigned char",
    "u16": "unsigned short",
    "u32": "unsigned int",
    "u64": "unsigned long long",
}
_LOADED_BY_16_BYTES: Final = frozenset({"x_terms", "x_quants"})  # of scratch buffers


# --- what is asked for --------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a build is to contain.

    weights: what x is multiplied by, each with the tensors of a file that it stands for. targets:
    GPUs of AMD. rows: numbers of rows M that must be served; none of them means every M. generic:
    the plain interface, whose kernels take M, N and K at run time. left_out: tensors of a file that
    get no kernel, and why.
    """

    weights: Mapping[WeightSpec, tuple[str, ...]]
    targets: tuple[Target, ...]
    rows: tuple[int, ...] = ()
    tuning: Tuning = field(default_factory=Tuning)
    generic: bool = False
    left_out: Mapping[str, str] | None = None


def weights_in(path: str) -> tuple[dict[WeightSpec, tuple[str, ...]], dict[str, str]]:
    """The weights of a GGUF file, by shape and format, and what else has two dimensions.

    Raises GGUFError for a damaged file and for one without a matrix in a block format, and OSError.
    """
    found: dict[WeightSpec, tuple[str, ...]] = {}
    left_out = {}
    with load_gguf(path) as file:
        for name in file:
            try:
                tensor = file[name]
            except GGUFError as error:  # of another format; the rest of the file is sound
                left_out[name] = str(error)
                continue
            if not isinstance(tensor, QuantizedTensor):
                continue
            if tensor.block_format.float_dtype is not None:
                left_out[name] = f"{tensor.format} is no block format"
                continue
            # what is built rounds no weights
            spec = replace(WeightSpec(*tensor.signature), suits_f16=True)
            found[spec] = (*found.get(spec, ()), name)
    if not found:
        formats = ", ".join(f.name for f in FORMATS.values() if f.float_dtype is None)
        raise GGUFError(
            f"{path}: found no weight among {counted(len(left_out), 'matrix', 'matrices')}; "
            f"accepted are tensors of two dimensions in {formats}"
        )
    return found, left_out


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things in words: `1 kernel`, `2 kernels`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def check_shape(fmt: Format, k: int, n: int) -> None:
    """Raise FormatError unless a weight [k, n] is whole blocks that a kernel can count."""
    fmt.row_bytes(k)
    if not (0 < n < 1 << 31 and k < 1 << 31):
        raise FormatError(f"found K = {k}, N = {n}: accepted are sizes from 1 to {(1 << 31) - 1}")


def row_classes(target: Target, tuning: Tuning) -> tuple[tuple[int, int | None], ...]:
    """The classes of M with kernels of their own: first and last M (None: no limit)."""
    tuning, firsts = _laid_out(tuning), dict[int, int]()
    for m in range(1, MANY_ROWS + 1):
        firsts.setdefault(m_class(target, m, tuning), m)
    starts = list(firsts.values())
    return tuple(zip(starts, [*(s - 1 for s in starts[1:]), None], strict=True))


# --- planning -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Argument:
    """One argument of a kernel: its name in the text, what the launcher puts there, its C type."""

    name: str
    role: str
    type: str

    @property
    def direction(self) -> str:
        return "out" if self.type.endswith("*") and not self.type.startswith("const ") else "in"


@dataclass(frozen=True)
class _Launch:
    """One kernel; `grid_x` is None where the grid is as wide as the result."""

    name: str
    source: Source
    block_size: int
    grid_x: int | None
    rows_per_block: int
    arguments: tuple[_Argument, ...]

    @property
    def stem(self) -> str:
        return f"{self.name}_{self.source.target.arch}"


@dataclass(frozen=True)
class _Product:
    """y = x @ w for one arch and one class of M: launches in order, scratch in bytes per row."""

    name: str
    target: Target
    fmt: Format
    shape: tuple[int, int] | None
    rows: tuple[int, int | None]
    precision: str
    layout: str
    finite: bool
    tensors: tuple[str, ...]
    launches: tuple[_Launch, ...]
    scratch: Mapping[str, int]


def _products(request: Request) -> list[_Product]:
    if request.generic:
        formats = dict.fromkeys(spec.block_format for spec in request.weights)
        return [
            _generic_product(request, fmt, target) for target in request.targets for fmt in formats
        ]
    return [
        _product(request, spec, target, rows)
        for target in request.targets
        for spec in request.weights
        for rows in _asked_classes(request, target)
    ]


def _asked_classes(request: Request, target: Target) -> list[tuple[int, int | None]]:
    tuning = _laid_out(request.tuning)
    wanted = {m_class(target, m, tuning) for m in request.rows}
    classes = row_classes(target, tuning)
    return [c for c in classes if not wanted or m_class(target, c[0], tuning) in wanted]


def _laid_out(tuning: Tuning) -> Tuning:
    """A program packs its weights in one layout for every M."""
    return replace(tuning, layout=tuning.layout or PLANAR)


def _product(
    request: Request, spec: WeightSpec, target: Target, rows: tuple[int, int | None]
) -> _Product:
    tuning = _laid_out(request.tuning)
    infinite = "" if spec.finite else "_inf"
    name = f"{spec.format.lower()}_k{spec.k}_n{spec.n}{infinite}_{tuning.precision}_{tuning.layout}"
    name += f"_{_rows_name(rows)}"

    def product(x: Any, w: Any) -> Any:
        return x @ w

    product.__name__ = name
    free_m = 2  # any number but 1, which would be traced as a broadcast
    graph = trace(product, (array_spec((free_m, spec.k)), spec))
    plan = make_plan(graph, target, rows[0], tuning)
    found: dict[str, int] = {}
    for kernel in plan.kernels:
        found |= _bytes_per_row(plan, kernel)
    return _Product(
        f"{name}_{target.arch}",
        target,
        spec.block_format,
        (spec.k, spec.n),
        rows,
        tuning.precision,
        tuning.layout or PLANAR,
        spec.finite,
        request.weights[spec],
        tuple(_launch(plan, kernel) for kernel in plan.kernels),
        found,
    )


def _rows_name(rows: tuple[int, int | None]) -> str:
    first, last = rows
    if last is None:
        return f"m{first}_up"
    return f"m{first}" if first == last else f"m{first}_{last}"


def _bytes_per_row(plan: HipPlan, kernel: HipKernel) -> dict[str, int]:
    one, two = (scratch(kernel, m) for m in (1, 2))
    assert all(two[slot] == 2 * size for slot, size in one.items()), "scratch counts rows"
    return {str(slot): size for slot, size in one.items()}


def _launch(plan: HipPlan, kernel: HipKernel) -> _Launch:
    blocks: Grid = grid(plan, kernel)
    assert blocks.rows_per_block is not None, "a product's grid depends on M"
    arguments = tuple(
        _Argument(p.name, _ROLES.get(p.slot.kind, str(p.slot)), _c_type(p.type))
        for p in parameters(plan, kernel)
    )
    return _Launch(
        kernel.work.name,
        render(plan, kernel),
        kernel.block_size,
        blocks.x,
        blocks.rows_per_block,
        arguments,
    )


def _c_type(text: str) -> str:
    return re.sub(r"\b[iu]\d+\b", lambda found: _C_TYPES[found[0]], text)


def _generic_product(request: Request, fmt: Format, target: Target) -> _Product:
    check_block_size(target, request.tuning.block_size)
    block_size = request.tuning.block_size or _BLOCK_SIZE
    source = render_generic(fmt, target, block_size)
    arguments = (
        _Argument("activations", "x", "const float*"),
        _Argument(f"weights_{fmt.name.lower()}", "weights", "const unsigned char*"),
        _Argument("output", "y", "float*"),
        *(_Argument(name.lower(), name, "int") for name in ("M", "N", "K")),
    )
    launch = _Launch(source.symbol, source, block_size, None, 1, arguments)
    tensors = tuple(
        name for spec, names in request.weights.items() if spec.format == fmt.name for name in names
    )
    return _Product(
        f"{source.symbol}_{target.arch}",
        target,
        fmt,
        None,
        (1, None),
        "f32",
        GGUF,
        False,
        tensors,
        (launch,),
        {},
    )


# --- building -----------------------------------------------------------------------------------

Progress = Callable[[Sequence[Any]], Iterable[Any]]


def build(request: Request, out: Path, *, force: bool = False, progress: Progress = iter) -> Any:
    """Compile what is asked for into the folder `out` and return the manifest.

    progress: is given the list of compilations and passes them on, one after the other. Files that
    an earlier build wrote are replaced, others only where `force` is set. Raises TargetError,
    CompileError, FileExistsError (nothing was written then) and OSError.
    """
    products = _products(request)
    launches = [launch for product in products for launch in product.launches]
    stems = [launch.stem for launch in launches]
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".hip", ".hsaco")]
    with _Folder(out, MANIFEST, out) as folder:
        folder.check([*names, HEADER], force=force)
        unpacker()  # what is missing is told before the long work
        compilers = {target: find_compiler(target) for target in request.targets}
        objects = {}
        for launch in progress(launches):
            objects[launch.stem] = _compiled(launch, compilers[launch.source.target])
        files = {}
        for launch in launches:
            files[f"{launch.stem}.hip"] = launch.source.text.encode()
            files[f"{launch.stem}.hsaco"] = objects[launch.stem]
        infos = {
            launch.stem: kernel_infos(objects[launch.stem])[launch.source.symbol]
            for launch in launches
        }
        files[HEADER] = _header(products, infos).encode()
        manifest = _manifest(request, products, infos, compilers) | {"files": _sums(files)}
        folder.write(files, manifest)
    return manifest


def _compiled(launch: _Launch, compiler: HipCompiler) -> bytes:
    source = launch.source
    return cache.fetch(source.target, compiler, source.symbol, source.text).object_bytes


@functools.cache
def version() -> str:
    """The version of q4jit: of the installed package, or of the checkout that runs."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return importlib.metadata.version("q4jit")


def _sums(files: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(files.items())
    }


# --- the manifest -------------------------------------------------------------------------------


def _manifest(
    request: Request,
    products: Sequence[_Product],
    infos: Mapping[str, KernelInfo],
    compilers: Mapping[Target, HipCompiler],
) -> dict[str, Any]:
    return {
        "q4jit": version(),
        "manifest_version": 1,
        "entry": "generic" if request.generic else "specialised",
        "computes": "y [M, N] = x [M, K] @ w [K, N]; x and y are f32, row by row",
        "how_to_launch": [
            "choose the product of the GPU's arch, the weight's format, K and N, and M",
            "allocate its scratch buffers; their contents before the first launch do not matter",
            "run its launches in order on one stream, each over its grid of blocks",
            "arguments are passed in order; offset_bytes is their place in the kernarg segment",
            "no launch asks for dynamic LDS; a block has exactly block_size threads (x axis)",
            "alignment_bytes is what a kernel needs of an address, and no more",
            "requires_finite_scales: whether a scale that is Inf or NaN makes results wrong",
            "what `q4jit pack` writes beside a weight says whether it has finite_scales",
        ],
        "compilers": {t.arch: compiler.fingerprint(t) for t, compiler in compilers.items()},
        "products": [_describe_product(product, infos) for product in products],
        "left_out": dict(request.left_out or {}),
        "header": HEADER,
    }


def _describe_product(product: _Product, infos: Mapping[str, KernelInfo]) -> dict[str, Any]:
    k, n = product.shape or ("K", "N")
    first, last = product.rows
    return {
        "name": product.name,
        "arch": product.target.arch,
        "wave": product.target.hip.wave,
        "format": product.fmt.name,
        "K": k,
        "N": n,
        "M": {"min": first, "max": last},
        "precision": product.precision,
        "requires_finite_scales": product.finite,
        "tensors": list(product.tensors),
        "weight": describe_layout(product.fmt, product.layout, product.shape),
        "scratch": [
            {
                "name": name,
                "bytes_per_row": size,
                "size_bytes": f"{size} * M",
                "alignment_bytes": _scratch_alignment_bytes(name),
            }
            for name, size in product.scratch.items()
        ],
        "launches": [_describe_launch(product, x, infos[x.stem]) for x in product.launches],
    }


def _describe_launch(product: _Product, launch: _Launch, info: KernelInfo) -> dict[str, Any]:
    visible = [a for a in info.arguments if not a.kind.startswith("hidden")]
    return {
        "symbol": launch.source.symbol,
        "source": f"{launch.stem}.hip",
        "code_object": f"{launch.stem}.hsaco",
        "block_size": launch.block_size,
        "grid": _describe_grid(launch),
        "static_lds_bytes": info.lds_bytes,
        "dynamic_lds_bytes": 0,
        "kernarg_bytes": info.kernarg_bytes,
        "vgprs": info.vgprs,
        "sgprs": info.sgprs,
        "arguments": [
            {
                "name": argument.name,
                "role": argument.role,
                "type": argument.type,
                "direction": argument.direction,
                "offset_bytes": place.offset_bytes,
                "size_bytes": place.size_bytes,
            }
            | _describe_buffer(product, argument.role)
            for argument, place in zip(launch.arguments, visible, strict=True)
        ],
    }


def _describe_grid(launch: _Launch) -> dict[str, Any]:
    x = "N" if launch.grid_x is None else launch.grid_x
    tiles = f"ceil(M / {launch.rows_per_block})"
    return {
        "x": x,
        "rows_per_block": launch.rows_per_block,
        "max_y": MAX_GRID_Y,
        "rule": f"x = {x}, y = min({tiles}, {MAX_GRID_Y}), z = ceil({tiles} / {MAX_GRID_Y})",
    }


def _describe_buffer(product: _Product, role: str) -> dict[str, Any]:
    """What the memory behind an argument is; a number has none."""
    k, n = product.shape or ("K", "N")
    if role == "weights":
        weight = describe_layout(product.fmt, product.layout, product.shape)
        return {"buffer_bytes": weight["size_bytes"], "alignment_bytes": weight["alignment_bytes"]}
    if role in {"x", "y"}:
        width = k if role == "x" else n
        size = f"4 * M * {width}"
        return {"shape": ["M", width], "buffer_bytes": size, "alignment_bytes": 4}
    if role in product.scratch:
        size = f"{product.scratch[role]} * M"
        return {"buffer_bytes": size, "alignment_bytes": _scratch_alignment_bytes(role)}
    return {}


def _scratch_alignment_bytes(name: str) -> int:
    return 16 if name in _LOADED_BY_16_BYTES else 4


# --- weights ------------------------------------------------------------------------------------


def describe_layout(fmt: Format, layout: str, shape: tuple[int, int] | None) -> dict[str, Any]:
    """Where the fields of a weight's blocks are, see docs/layouts.md; all sizes in bytes.

    shape: (K, N); None, for `gguf`, where it is known at run time only.
    """
    if layout == INTERLEAVED16:
        assert shape is not None
        return _describe_interleaved(Interleaved(fmt, *shape))
    found: dict[str, Any] = {
        "layout": layout,
        "address": "offset_bytes + (column * blocks + block) * stride_bytes",
    }
    if layout == PLANAR:
        assert shape is not None
        planar = Planar(fmt, *shape)
        regions = [(name, at, size, size) for name, (at, size) in planar.regions.items()]
        elements, alignment, size_bytes = planar.block_elements, 16, planar.size_bytes
    elif fmt.float_dtype is not None:
        regions = [("values", 0, fmt.block_bytes, fmt.block_bytes)]
        elements, alignment, size_bytes = 1, fmt.block_bytes, None
    else:
        regions = [(f.name, f.source_bytes, fmt.block_bytes, f.size_bytes) for f in fields(fmt)]
        elements, alignment, size_bytes = fmt.block_elements, 2, None
    if shape is None:
        blocks: Any = f"K / {elements}"
        size: Any = f"N * K / {elements} * {fmt.block_bytes}"
    else:
        blocks = -(-shape[0] // elements)
        size = size_bytes or shape[1] * fmt.row_bytes(shape[0])
    return found | {
        "size_bytes": size,
        "alignment_bytes": alignment,
        "block_elements": elements,
        "blocks": blocks,
        "regions": [
            {"name": name, "offset_bytes": at, "stride_bytes": stride, "field_bytes": size_of_field}
            for name, at, stride, size_of_field in regions
        ],
    }


def _describe_interleaved(shape: Interleaved) -> dict[str, Any]:
    units = {f.name: f for f in fields(shape.fmt)}
    places = {name: shape.offset_bytes(name) for name in units}
    return {
        "layout": INTERLEAVED16,
        "address": f"(column // {LANES} * tiles + block // blocks_per_tile) * tile_bytes"
        " + offset_bytes + block % blocks_per_tile * stride_bytes"
        f" + (unit * {LANES} + column % {LANES}) * unit_bytes",
        "size_bytes": shape.groups * shape.group_bytes,
        "alignment_bytes": 64,
        "block_elements": shape.block_elements,
        "blocks": shape.blocks,
        "blocks_per_tile": shape.blocks_per_tile,
        "tiles": shape.tiles,
        "tile_bytes": shape.tile_bytes,
        "regions": [
            {
                "name": name,
                "offset_bytes": at,
                "stride_bytes": stride,
                "unit_bytes": units[name].unit_bytes,
                "field_bytes": units[name].size_bytes,
            }
            for name, (at, stride) in sorted(places.items(), key=lambda item: item[1])
        ],
    }


def pack_tensor(path: str, name: str, layout: str, out: Path, *, force: bool = False) -> Any:
    """Write a tensor of a GGUF file to `out` in a layout, and what that is to `out`.json.

    Returns the description. Raises GGUFError, MissingNameError, ArgumentError for a vector and
    for an `out` that is the file itself, FileExistsError (see `build`) and OSError.
    """
    description_name = f"{out.name}.json"
    for place in (out, out.with_name(description_name)):
        if place.exists() and place.samefile(path):
            raise ArgumentError(f"{place} is the file that is read, {path}: accepted is another")
    with load_gguf(path) as file:
        tensor = file[name]
    if not isinstance(tensor, QuantizedTensor):
        raise ArgumentError(f"{name} in {path} is a vector of {tensor.size}; accepted are matrices")
    fmt = tensor.block_format
    data = tensor.raw.reshape(-1) if layout == GGUF else pack(fmt, layout, tensor.raw)
    description = {
        "q4jit": version(),
        "tensor": name,
        "format": fmt.name,
        "K": tensor.shape[0],
        "N": tensor.shape[1],
        "finite_scales": tensor.has_finite_scales,
        "weight": describe_layout(fmt, layout, tensor.shape),
    }
    files = {out.name: data.data}
    description["files"] = _sums(files)
    with _Folder(out.parent, description_name, out) as folder:
        folder.check([out.name], force=force)
        folder.write(files, description)
    return description


# --- the C header -------------------------------------------------------------------------------

_HEADER_HEAD: Final = """\
/* Kernels built by q4jit {version}. {manifest} says the same, and what each argument is.
   For a product and M rows of x, run its launches in order on one stream, each with blocks of
   block_size threads, no dynamic LDS, and the grid
       x = grid_x (0: N), tiles = ceil(M / rows_per_block),
       y = min(tiles, Q4JIT_MAX_GRID_Y), z = ceil(tiles / Q4JIT_MAX_GRID_Y).
   x and y start at multiples of 4 bytes, weights at multiples of weight_alignment_bytes, scratch
   buffers at multiples of 16 bytes, as all that hipMalloc gives does. */
#ifndef Q4JIT_KERNELS_H
#define Q4JIT_KERNELS_H

#define Q4JIT_MAX_GRID_Y {max_grid_y}

/* What an argument is. Pointers to the device's memory, but for the counts: M is a long long for
   specialised kernels; M, N and K are ints for generic ones. */
enum q4jit_role {{
    Q4JIT_END, /* behind the last argument */
    Q4JIT_X,
    Q4JIT_WEIGHTS,
    Q4JIT_Y,
    Q4JIT_M,
    Q4JIT_N,
    Q4JIT_K,
    Q4JIT_SCRATCH /* scratch buffer 0; the next ones count on */
}};

struct q4jit_launch {{
    const char *file; /* the code object */
    const char *symbol;
    unsigned block_size, grid_x, rows_per_block, static_lds_bytes;
    int arguments[{arguments}]; /* q4jit_role, then Q4JIT_END */
}};

/* Field `name` of a block is at offset_bytes + (column * blocks + block) * stride_bytes. */
struct q4jit_region {{
    const char *name;
    long long offset_bytes, stride_bytes;
}};

struct q4jit_product {{
    const char *name, *arch, *format, *precision, *layout;
    long long k, n;         /* 0: any */
    long long m_min, m_max; /* m_max 0: no limit */
    long long weight_bytes; /* 0: any */
    int weight_alignment_bytes;
    /* 1: a scale or minimum of the weight that is Inf or NaN makes results wrong; what `q4jit pack`
       writes beside a weight says whether it has finite_scales. 0: every weight is right. */
    int requires_finite_scales;
    int block_elements, region_count;
    struct q4jit_region regions[{regions}];
    int scratch_count;
    long long scratch_bytes_per_row[{scratch}];
    int launch_count;
    struct q4jit_launch launches[{launches}];
}};

"""
_C_ROLES: Final = {
    "x": "Q4JIT_X",
    "weights": "Q4JIT_WEIGHTS",
    "y": "Q4JIT_Y",
    "M": "Q4JIT_M",
    "N": "Q4JIT_N",
    "K": "Q4JIT_K",
}


def _header(products: Sequence[_Product], infos: Mapping[str, KernelInfo]) -> str:
    """The table of products for C and C++. Names are made of formats, archs and numbers alone."""
    weights = [describe_layout(p.fmt, p.layout, p.shape) for p in products]
    launches = [launch for product in products for launch in product.launches]
    head = _HEADER_HEAD.format(
        version=version(),
        manifest=MANIFEST,
        max_grid_y=MAX_GRID_Y,
        arguments=1 + max(len(launch.arguments) for launch in launches),
        regions=max(len(weight["regions"]) for weight in weights),
        scratch=max(1, *(len(p.scratch) for p in products)),
        launches=max(len(p.launches) for p in products),
    )
    names = [f"    Q4JIT_{_mangled(p.name)},\n" for p in products]
    rows = [_c_product(p, w, infos) for p, w in zip(products, weights, strict=True)]
    return "".join(
        [
            head,
            "/* Places in q4jit_products. */\n",
            "enum q4jit_index {\n",
            *names,
            "    Q4JIT_PRODUCT_COUNT\n};\n\n",
            "static const struct q4jit_product q4jit_products[Q4JIT_PRODUCT_COUNT] = {\n",
            *rows,
            "};\n\n#endif\n",
        ]
    )


def _mangled(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII).upper()


def _c_product(
    product: _Product, weight: Mapping[str, Any], infos: Mapping[str, KernelInfo]
) -> str:
    k, n = product.shape or (0, 0)
    texts = (product.name, product.target.arch, product.fmt.name, product.precision, product.layout)
    regions = [
        f"{{{_c_string(r['name'])}, {r['offset_bytes']}, {r['stride_bytes']}}}"
        for r in weight["regions"]
    ]
    scratch = [str(size) for size in product.scratch.values()] or ["0"]
    launches = [_c_launch(product, launch, infos[launch.stem]) for launch in product.launches]
    return (
        f"    {{{', '.join(map(_c_string, texts))},\n"
        f"     {k}, {n}, {product.rows[0]}, {product.rows[1] or 0},"
        f" {weight['size_bytes'] if product.shape else 0},"
        f" {weight['alignment_bytes']}, {int(product.finite)},\n"
        f"     {weight['block_elements']}, {len(regions)}, {{{', '.join(regions)}}},\n"
        f"     {len(product.scratch)}, {{{', '.join(scratch)}}},\n"
        f"     {len(launches)},\n     {{{f',{chr(10)}      '.join(launches)}}}}},\n"
    )


def _c_launch(product: _Product, launch: _Launch, info: KernelInfo) -> str:
    places = {name: f"Q4JIT_SCRATCH + {i}" for i, name in enumerate(product.scratch)}
    roles = [(_C_ROLES | places)[argument.role] for argument in launch.arguments]
    numbers = (launch.block_size, launch.grid_x or 0, launch.rows_per_block, info.lds_bytes)
    return (
        f"{{{_c_string(f'{launch.stem}.hsaco')}, {_c_string(launch.source.symbol)},"
        f" {', '.join(map(str, numbers))},\n       {{{', '.join([*roles, 'Q4JIT_END'])}}}}}"
    )


def _c_string(text: str) -> str:
    return json.dumps(text)  # ASCII; no text here needs an escape that C lacks


# --- files --------------------------------------------------------------------------------------


class _Folder:
    """A folder that files are put into all together, the JSON that names them last.

    It is made where it does not exist, and removed again where nothing was written. Everything is
    first written beside its place, so that what fails half-way leaves what was there before.
    asked: what the user wrote, which messages name.
    """

    def __init__(self, path: Path, manifest: str, asked: Path) -> None:
        self._path = path
        self._manifest = manifest
        self._asked = asked
        self._made = [p for p in (path, *path.parents) if not p.exists()]

    def __enter__(self) -> "_Folder":
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            # found out before the long work, also where permission bits do not say it
            self._staging = tempfile.TemporaryDirectory(prefix=".q4jit-", dir=self._path)
        except OSError as error:
            self._remove_made()
            reason = error.strerror
            if self._path.exists() and not self._path.is_dir():
                reason = "it is a file, accepted is a folder"
            where = "" if self._asked == self._path else f"its folder {self._path}: "
            raise OSError(f"cannot write {self._asked}: {where}{reason}") from error
        return self

    def __exit__(self, *error: object) -> None:
        self._staging.cleanup()
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in self._made:
            if not folder.is_dir():  # it could not be made
                continue
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def check(self, names: Sequence[str], *, force: bool) -> None:
        """Raise FileExistsError if writing would replace files of somebody else, or folders."""
        for place in (self._path / name for name in (*names, self._manifest)):
            if place.is_dir():
                raise FileExistsError(f"{place} is a folder: accepted is a place for a file")
        own = self._own_files()
        foreign = [
            name
            for name in (*names, self._manifest)
            if os.path.lexists(self._path / name) and name not in own
        ]
        if foreign and not force:
            some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if foreign[3:] else "")
            raise FileExistsError(
                f"{self._path} holds files that q4jit did not write, or that were changed: {some}; "
                "accepted are another place, or --force to replace them"
            )

    def write(self, files: Mapping[str, bytes | memoryview], manifest: Mapping[str, Any]) -> None:
        """Put files and manifest in their places, and remove what only the last one named."""
        staging = Path(self._staging.name)
        text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
        everything = {**files, self._manifest: text.encode()}
        for name, data in everything.items():
            try:
                (staging / name).write_bytes(data)
            except OSError as error:  # a full disk; the name in it is of a file that goes away
                raise OSError(error.errno, error.strerror, str(self._path / name)) from error
        stale = self._own_files() - everything.keys()
        (self._path / self._manifest).unlink(missing_ok=True)  # it names a whole set, or is not
        for name in stale:
            (self._path / name).unlink()
        missing = list(everything)
        try:
            for name in everything:
                (staging / name).replace(self._path / name)
                missing.remove(name)
        except OSError as error:
            raise OSError(
                f"{self._path} is incomplete, missing: {', '.join(missing)} ({error})"
            ) from error

    def _own_files(self) -> set[str]:
        """The files that an earlier manifest here names and that are still as it says."""
        path = self._path / self._manifest
        try:
            found = json.loads(path.read_bytes())
            sums = {name: str(entry["sha256"]) for name, entry in found["files"].items()}
            found["q4jit"]
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return set()  # not written by q4jit
        own = {name for name, digest in sums.items() if self._holds(name, digest)}
        return own | {self._manifest}

    def _holds(self, name: str, digest: str) -> bool:
        path = self._path / name
        if path.parent != self._path or path.is_symlink() or not path.is_file():
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
