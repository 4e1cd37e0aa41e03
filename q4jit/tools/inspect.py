"""What a GGUF file holds, which kernels would serve its weights, and what cannot be used."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from q4jit.backends import find_backend
from q4jit.dispatch.policy import Place
from q4jit.errors import GGUFError, Q4JitError, shortened
from q4jit.frontend.specs import WeightSpec, array_spec, ids_spec
from q4jit.frontend.trace import trace
from q4jit.plan.kernels import ScheduledKernel
from q4jit.plan.options import PlanOptions
from q4jit.tools.text import counted, in_bytes
from q4jit.version import version
from q4jit.weights.gguf.file import GGUFFile, load_gguf
from q4jit.weights.gguf.tensors import TensorEntry
from q4jit.weights.gguf.types import bits_per_element
from q4jit.weights.indexed import vecmat

VECTOR, MATRIX, EXPERTS, UNUSED = "vector", "matrix", "experts", "unused"
_USES: Final = {1: VECTOR, 2: MATRIX, 3: EXPERTS}
_NOUNS: Final = {
    VECTOR: ("vector", "vectors"),
    MATRIX: ("matrix", "matrices"),
    EXPERTS: ("expert tensor", "expert tensors"),
}
# texts come from a file that may be hostile
_short: Final = functools.partial(shortened, most=120)
_SHOWN_SHAPES: Final = 3
_SHOWN_NAMES: Final = 3
_SHOWN_REASONS: Final = 20


def examine(
    path: str, places: Sequence[Place], rows: Sequence[int], precisions: Sequence[str]
) -> dict[str, Any]:
    """Return everything that `q4jit inspect` reports, as JSON can hold it.

    Only the header is read, so scales are taken to be finite. places: where kernels would run.
    rows: numbers of rows of x. Raises GGUFError and OSError.
    """
    with load_gguf(path) as model:
        tensors = [_tensor(entry) for entry in model.tensors.values()]
        weights = _weights(tensors)
        return {
            "q4jit": version(),
            "files": [{"path": p, "size_bytes": Path(p).stat().st_size} for p in model.paths],
            "architecture": _text(model, "general.architecture"),
            "name": _text(model, "general.name"),
            "keys": len(model.metadata),
            "formats": _formats(tensors),
            "tensors": tensors,
            "kernels": [
                _served(place, precision, m, weight, names)
                for place in places
                for precision in precisions
                for m in rows
                for weight, names in weights.items()
            ],
        }


def _text(model: GGUFFile, key: str) -> str | None:
    try:
        value = model.metadata.get(key)
    except GGUFError:  # damaged text; the tensors are valid
        return None
    return value if isinstance(value, str) else None


def _tensor(entry: TensorEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "format": entry.format,
        "ggml_type": entry.ggml_type,
        "shape": list(entry.shape),
        "size_bytes": entry.nbytes,
        "use": _USES[entry.rank] if entry.readable else UNUSED,
        "problem": entry.problem,
    }


def _formats(tensors: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the formats in the order of their bytes, the largest first."""
    formats: dict[int, dict[str, Any]] = {}
    for tensor in tensors:
        ggml_type = tensor["ggml_type"]
        new = {
            "format": tensor["format"],
            "ggml_type": ggml_type,
            "bits": bits_per_element(ggml_type),
            "size_bytes": 0,
            "tensors": 0,
            **dict.fromkeys((*_USES.values(), UNUSED), 0),
        }
        row = formats.setdefault(ggml_type, new)
        row["size_bytes"] += tensor["size_bytes"]
        row["tensors"] += 1
        row[tensor["use"]] += 1
    return sorted(formats.values(), key=lambda row: -int(row["size_bytes"]))


# --- kernels --------------------------------------------------------------------------------------

_Weight = tuple[str, tuple[int, ...]]  # format and shape: (K, N), or (K, N, E) of experts


def _weights(tensors: Iterable[dict[str, Any]]) -> dict[_Weight, list[str]]:
    """Return the names of the tensors that products multiply by, by format and shape."""
    weights: dict[_Weight, list[str]] = {}
    for tensor in tensors:
        if tensor["use"] in {MATRIX, EXPERTS}:
            rank = 2 if tensor["use"] == MATRIX else 3
            key = tensor["format"], tuple(tensor["shape"][:rank])
            weights.setdefault(key, []).append(tensor["name"])
    return weights


def _served(
    place: Place, precision: str, m: int, weight: _Weight, names: list[str]
) -> dict[str, Any]:
    """Return the kernels of x @ w for m rows of x; with experts, each row by the one it chose."""
    fmt, shape = weight
    row: dict[str, Any] = {
        "target": str(place.target),
        "device": None if place.device is None else str(place.device),
        "precision": precision,
        "M": m,
        "format": fmt,
        "shape": list(shape),
        "tensors": len(names),
        "kernels": [],
        "remarks": {},
        "problem": "",
    }
    k, n, experts = (*shape, 0)[:3]
    spec = WeightSpec(fmt, k, n, experts=experts)
    try:
        row |= _planned(place, PlanOptions(precision), m, spec)
    except Q4JitError as error:  # no compiler for the device, for example
        row["problem"] = " ".join(str(error).split())
    return row


def _planned(place: Place, plan_options: PlanOptions, m: int, spec: WeightSpec) -> dict[str, Any]:
    def product(x: Any, w: Any) -> Any:
        return x @ w

    def chosen_product(x: Any, w: Any, ids: Any) -> Any:
        return vecmat(x, w[ids])

    x = array_spec((m, spec.k))
    if spec.experts:
        graph = trace(chosen_product, (x, spec, ids_spec((m,))))
    else:
        graph = trace(product, (x, spec))
    backend = find_backend(place.target)
    plan = backend.plan(graph, place.target, m, plan_options, place.device)
    remarks: dict[str, list[str]] = {}
    for remark in backend.explain(plan, plan_options, False):
        remarks.setdefault(remark.about, []).append(remark.text)
    return {"kernels": list(map(_kernel, plan.kernels)), "remarks": remarks}


def _kernel(kernel: ScheduledKernel) -> dict[str, Any]:
    work = kernel.work
    schedules = dict.fromkeys(map(kernel.schedule_of, work.sections))
    before = [name for name in schedules if not kernel.rows_class.startswith(name)]
    text = ", ".join([*before, kernel.rows_class])
    return {"text": text, "multiplies": bool(work.sections)}


# --- the report as text ---------------------------------------------------------------------------


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as text."""
    yield from _head(report)
    yield ""
    yield from _table(
        ("format", ">tensors", ">bytes", ">bits", "use"), map(_format_cells, report["formats"])
    )
    places: dict[tuple[str, str], list[Any]] = {}
    for row in report["kernels"]:
        where = row["device"] or row["target"]
        places.setdefault((where, row["precision"]), []).append(row)
    has_experts = any(row["use"] == EXPERTS for row in report["tensors"])
    products = "x @ w, and of np.vecmat(x, w[ids]) with experts," if has_experts else "x @ w"
    for (where, precision), rows in places.items():
        yield from ("", f"kernels of {products} on {where}, precision {precision}")
        yield from _table((">M", "format", "kernels", ">tensors", "K × N"), _kernel_cells(rows))
    yield ""
    yield from _unused(report["tensors"])


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    files = report["files"]
    architecture = _short(report["architecture"] or "unknown architecture")
    name = f" ({_short(report['name'])})" if report["name"] else ""
    yield f"{files[0]['path']}: {architecture}{name}"
    size = in_bytes(sum(file["size_bytes"] for file in files))
    tensors, keys = counted(len(report["tensors"]), "tensor"), counted(report["keys"], "key")
    yield f"  {tensors}, {keys}, {size} in {counted(len(files), 'file')}"


def _format_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = row["format"] if row["bits"] else f"type {row['ggml_type']}"
    bits = f"{row['bits']:.2f}" if row["bits"] else "?"
    uses = [counted(row[use], *nouns) for use, nouns in _NOUNS.items() if row[use]]
    if row[UNUSED]:
        uses.append(f"{row[UNUSED]} not usable")
    return name, str(row["tensors"]), in_bytes(row["size_bytes"]), bits, ", ".join(uses)


def _kernel_cells(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield a line for all weights of a format that have the same kernels."""
    alike: dict[tuple[int, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["M"], row["format"], _kernel_text(row)), []).append(row)
    for (m, fmt, text), group in alike.items():
        shapes = [" × ".join(map(str, row["shape"])) for row in group]
        shown = _short(", ".join(shapes[:_SHOWN_SHAPES]))
        if len(shapes) > _SHOWN_SHAPES:
            shown += f" and {len(shapes) - _SHOWN_SHAPES} more"
        yield str(m), fmt, text, str(sum(row["tensors"] for row in group)), shown


def _kernel_text(row: Mapping[str, Any]) -> str:
    if row["problem"]:
        return _short(f"none: {row['problem']}")
    text = " + ".join(kernel["text"] for kernel in row["kernels"] if kernel["multiplies"])
    if "precision" in row["remarks"]:
        text += "; more exact than asked"
    return text


def _unused(tensors: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the tensors that cannot be used, by the reason."""
    names: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor["problem"]:
            names.setdefault(tensor["problem"], []).append(tensor["name"])
    if not names:
        yield "every tensor can be used"
        return
    yield f"not usable: {counted(sum(map(len, names.values())), 'tensor')}"
    for problem, some in list(names.items())[:_SHOWN_REASONS]:
        more = f" and {len(some) - _SHOWN_NAMES} more" if len(some) > _SHOWN_NAMES else ""
        shown = ", ".join(map(_short, some[:_SHOWN_NAMES]))
        yield f"  {shown}{more}: {_short(problem)}"
    if len(names) > _SHOWN_REASONS:
        yield f"  … and {len(names) - _SHOWN_REASONS} more reasons"


def _table(titles: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yield aligned lines. A title that begins with > is that of numbers."""
    aligns = [">" if title.startswith(">") else "<" for title in titles]
    lines = [tuple(title.lstrip(">") for title in titles), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, aligns, widths, strict=True)
        yield "  " + "  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip()
