"""`manifest.json`: everything that a program needs to launch the kernels."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from q4jit.compilers.codeobject import KernelInfo
from q4jit.compilers.find import HipCompiler
from q4jit.hip.kernel import MAX_GRID_Y
from q4jit.targets import Target
from q4jit.tools.aot.layout import describe_layout
from q4jit.tools.aot.products import BuiltLaunch, BuiltProduct
from q4jit.tools.aot.request import BuildRequest
from q4jit.version import version

MANIFEST: Final = "manifest.json"
_LOADED_BY_16_BYTES: Final = frozenset({"x_terms", "x_quants"})  # scratch buffers


def manifest_of(
    request: BuildRequest,
    products: Sequence[BuiltProduct],
    infos: Mapping[str, KernelInfo],
    compilers: Mapping[Target, HipCompiler],
) -> dict[str, Any]:
    """Return the manifest of a build, without the names and checksums of its files."""
    return {
        "q4jit": version(),
        "manifest_version": 1,
        "entry": "generic" if request.generic else "specialised",
        "computes": "y [M, N] = x [M, K] @ w [K, N]; x and y are f32, row-major",
        "how_to_launch": [
            "choose the product for the GPU's arch, the weight's format, K and N, and M",
            "allocate its scratch buffers; they need no initialisation",
            "run its launches in order on one stream, each over its grid of thread blocks",
            "pass the arguments in order; offset_bytes is the offset in the kernarg segment",
            "launch thread blocks of exactly block_size threads (x axis), without dynamic LDS",
            "align each buffer to alignment_bytes; kernels need no larger alignment",
            "requires_finite_scales: if true, a scale that is Inf or NaN makes results wrong",
            "finite_scales in the JSON file of `q4jit pack`: whether no scale is Inf or NaN",
        ],
        "compilers": {t.arch: compiler.fingerprint(t) for t, compiler in compilers.items()},
        "products": [_describe_product(product, infos) for product in products],
        "left_out": dict(request.left_out or {}),
    }


def _describe_product(product: BuiltProduct, infos: Mapping[str, KernelInfo]) -> dict[str, Any]:
    k, n = product.shape or ("K", "N")
    first, last = product.m_range
    return {
        "name": product.name,
        "arch": product.target.arch,
        "wave": product.target.hip.wave,
        "format": product.fmt.name,
        "K": k,
        "N": n,
        "M": {"min": first, "max": last},
        "precision": product.precision,
        "requires_finite_scales": product.requires_finite_scales,
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
                "offset_bytes": compiled.offset_bytes,
                "size_bytes": compiled.size_bytes,
            }
            | _describe_buffer(product, argument.role)
            for argument, compiled in zip(launch.arguments, visible, strict=True)
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
    """Return the size and alignment of an argument's buffer; nothing for a number."""
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
