"""`q4jit_kernels.h`: the manifest as a table for C and C++."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from q4jit.compilers.codeobject import KernelInfo
from q4jit.hip.kernel import MAX_GRID_Y
from q4jit.tools.aot.layout import describe_layout
from q4jit.tools.aot.manifest import MANIFEST
from q4jit.tools.aot.products import BuiltLaunch, BuiltProduct
from q4jit.version import version

HEADER: Final = "q4jit_kernels.h"
_HEADER_HEAD: Final = """\
/* Kernels built by q4jit {version}. {manifest} contains the same facts and describes each
   argument.

   To compute a product for M rows of x, run its launches in order on one stream. Each launch uses
   thread blocks of block_size threads, no dynamic LDS, and this grid:
       tiles = ceil(M / rows_per_block)
       x = grid_x, or N if grid_x is 0
       y = min(tiles, Q4JIT_MAX_GRID_Y)
       z = ceil(tiles / Q4JIT_MAX_GRID_Y)

   Alignment of addresses in bytes: 4 for x and y, weight_alignment_bytes for weights, 16 for
   scratch buffers. Memory from hipMalloc always fits. */
#ifndef Q4JIT_KERNELS_H
#define Q4JIT_KERNELS_H

#define Q4JIT_MAX_GRID_Y {max_grid_y}

/* The meaning of an argument. X, WEIGHTS, Y and SCRATCH are pointers to device memory. M is a
   long long in specialised kernels; M, N and K are ints in generic kernels. */
enum q4jit_role {{
    Q4JIT_END, /* follows the last argument */
    Q4JIT_X,
    Q4JIT_WEIGHTS,
    Q4JIT_Y,
    Q4JIT_M,
    Q4JIT_N,
    Q4JIT_K,
    Q4JIT_SCRATCH /* scratch buffer 0; Q4JIT_SCRATCH + i is buffer i */
}};

struct q4jit_launch {{
    const char *file; /* name of the code object */
    const char *symbol;
    unsigned block_size, grid_x, rows_per_block, static_lds_bytes;
    int arguments[{arguments}]; /* enum q4jit_role, ended by Q4JIT_END */
}};

/* Field `name` of a block is at offset_bytes + (column * blocks + block) * stride_bytes, where
   blocks = ceil(K / block_elements). */
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
    /* 1: results are wrong if a scale or minimum of the weight is Inf or NaN; `finite_scales` in
       the JSON file of `q4jit pack` says that none is. 0: results are right for every weight. */
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
    """Return the header. The names in it consist of formats, archs and numbers only."""
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
    products_in_c = [_c_product(p, w, infos) for p, w in zip(products, weights, strict=True)]
    return "".join(
        [
            head,
            "/* Indices of q4jit_products. */\n",
            "enum q4jit_index {\n",
            *names,
            "    Q4JIT_PRODUCT_COUNT\n};\n\n",
            "static const struct q4jit_product q4jit_products[Q4JIT_PRODUCT_COUNT] = {\n",
            *products_in_c,
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
        f"     {k}, {n}, {product.m_range[0]}, {product.m_range[1] or 0},"
        f" {weight['size_bytes'] if product.shape else 0},"
        f" {weight['alignment_bytes']}, {int(product.requires_finite_scales)},\n"
        f"     {weight['block_elements']}, {len(regions)}, {{{', '.join(regions)}}},\n"
        f"     {len(product.scratch)}, {{{', '.join(scratch)}}},\n"
        f"     {len(launches)},\n     {{{f',{chr(10)}      '.join(launches)}}}}},\n"
    )


def _c_launch(product: BuiltProduct, launch: BuiltLaunch, info: KernelInfo) -> str:
    scratch = {name: f"Q4JIT_SCRATCH + {i}" for i, name in enumerate(product.scratch)}
    roles = [(_C_ROLES | scratch)[argument.role] for argument in launch.arguments]
    numbers = (launch.block_size, launch.grid_x or 0, launch.rows_per_block, info.lds_bytes)
    return (
        f"{{{_c_string(f'{launch.stem}.hsaco')}, {_c_string(launch.source.symbol)},"
        f" {', '.join(map(str, numbers))},\n       {{{', '.join([*roles, 'Q4JIT_END'])}}}}}"
    )


def _c_string(text: str) -> str:
    return json.dumps(text)  # ASCII names: JSON and C write them alike
