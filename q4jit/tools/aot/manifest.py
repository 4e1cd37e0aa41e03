"""`manifest.json`: everything that a launch needs to know."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from q4jit.compilers.codeobject import KernelInfo
from q4jit.compilers.find import HipCompiler
from q4jit.hip.kernel import MAX_GRID_Y
from q4jit.targets import Target
from q4jit.tools.aot.layout import describe_layout
from q4jit.tools.aot.products import BuiltLaunch, BuiltProduct
from q4jit.tools.aot.request import BuildRequest
from q4jit.tools.provenance import version

MANIFEST: Final = "manifest.json"
_LOADED_BY_16_BYTES: Final = frozenset({"x_terms", "x_quants"})  # of scratch buffers


def manifest_of(
    request: BuildRequest,
    products: Sequence[BuiltProduct],
    infos: Mapping[str, KernelInfo],
    compilers: Mapping[Target, HipCompiler],
) -> dict[str, Any]:
    """Return the manifest of a build, but for the names of its files."""
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
    }


def _describe_product(product: BuiltProduct, infos: Mapping[str, KernelInfo]) -> dict[str, Any]:
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


def _describe_launch(
    product: BuiltProduct, launch: BuiltLaunch, info: KernelInfo
) -> dict[str, Any]:
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


def _describe_grid(launch: BuiltLaunch) -> dict[str, Any]:
    x = "N" if launch.grid_x is None else launch.grid_x
    tiles = f"ceil(M / {launch.rows_per_block})"
    return {
        "x": x,
        "rows_per_block": launch.rows_per_block,
        "max_y": MAX_GRID_Y,
        "rule": f"x = {x}, y = min({tiles}, {MAX_GRID_Y}), z = ceil({tiles} / {MAX_GRID_Y})",
    }


def _describe_buffer(product: BuiltProduct, role: str) -> dict[str, Any]:
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
