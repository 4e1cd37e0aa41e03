"""`q4jit_kernels.h`: what the manifest says, as a table for C and C++."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from q4jit.compilers.codeobject import KernelInfo
from q4jit.hip.kernel import MAX_GRID_Y
from q4jit.tools.aot.layout import describe_layout
from q4jit.tools.aot.manifest import MANIFEST
from q4jit.tools.aot.products import BuiltLaunch, BuiltProduct
from q4jit.tools.provenance import version

HEADER: Final = "q4jit_kernels.h"
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


def header_text(products: Sequence[BuiltProduct], infos: Mapping[str, KernelInfo]) -> str:
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
    product: BuiltProduct, weight: Mapping[str, Any], infos: Mapping[str, KernelInfo]
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


def _c_launch(product: BuiltProduct, launch: BuiltLaunch, info: KernelInfo) -> str:
    places = {name: f"Q4JIT_SCRATCH + {i}" for i, name in enumerate(product.scratch)}
    roles = [(_C_ROLES | places)[argument.role] for argument in launch.arguments]
    numbers = (launch.block_size, launch.grid_x or 0, launch.rows_per_block, info.lds_bytes)
    return (
        f"{{{_c_string(f'{launch.stem}.hsaco')}, {_c_string(launch.source.symbol)},"
        f" {', '.join(map(str, numbers))},\n       {{{', '.join([*roles, 'Q4JIT_END'])}}}}}"
    )


def _c_string(text: str) -> str:
    return json.dumps(text)  # ASCII; no text here needs an escape that C lacks
