"""The variables of the templates: everything that the text of a planned kernel is made of."""

from dataclasses import dataclass, field
from typing import Any, Final

from q4jit.frontend.graph import Node
from q4jit.hip.elementary import elementary_functions
from q4jit.hip.experts import matrix_bytes
from q4jit.hip.gemv_matrix_sizes import matrix_variables, row_values
from q4jit.hip.kernel import (
    ADD_SPLITS,
    BOUNDED_THREADS,
    DEQUANTIZE,
    GEMV,
    GEMV_DOT,
    GEMV_MATRIX,
    GEMV_TRANSPOSED,
    MATRIX_COLUMNS,
    MAX_GRID_Y,
    QUAD_UNITS,
    ROWS,
    SORT_EXPERTS,
    TILE_HALVES,
    TILE_HALVES_TRANSPOSED,
    UNIT_ELEMENTS,
    HipKernel,
    HipPlan,
)
from q4jit.hip.long_sums import long_sums
from q4jit.hip.matrix_units import QUARTER_ELEMENTS, UNIT_QUARTERS
from q4jit.hip.memory import (
    ELEMENT_STAGE_UNITS,
    adds_up_blocks,
    finds_largest,
    finds_maximum,
    shared_bytes,
)
from q4jit.hip.names import buffer_name, c_names
from q4jit.hip.rows_sizes import rows_variables
from q4jit.hip.tile_halves_sizes import tile_halves_variables
from q4jit.hip.transposed import transposed_variables
from q4jit.hip.values import HipValues, Statement, Sum, expert_index, parameters, store_index
from q4jit.hip.weight import KernelWeight, Product, called_functions
from q4jit.plan.kernels import Kernel, Store

_STAGED_TERMS: Final = frozenset({TILE_HALVES, TILE_HALVES_TRANSPOSED})  # `rows` has split their x
_ROLLED: Final = _STAGED_TERMS | {GEMV, GEMV_DOT, GEMV_MATRIX, GEMV_TRANSPOSED}


def variables(plan: HipPlan, kernel: HipKernel) -> dict[str, Any]:
    """Return the variables of the templates for a kernel, except the platform."""
    writer = _Writer(plan, kernel)
    work = kernel.work
    products = writer.products()
    decoded = writer.decoded()
    read = products if kernel.multiplied else []
    weights = [p.weight for p in read] + ([decoded["weight"]] if decoded else [])
    sums = long_sums(plan, kernel)
    result: dict[str, Any] = {
        "kernel": kernel,
        "transposed": work.is_transposed,
        "stretch_units": sums.stretch_units,
        "arch": plan.target.hip,
        "schedule": kernel.schedule,
        "max_grid_y": MAX_GRID_Y,
        "bounded_threads": BOUNDED_THREADS,
        "unit_elements": UNIT_ELEMENTS,
        "panel": MATRIX_COLUMNS,
        "quarter_elements": QUARTER_ELEMENTS,
        "unit_quarters": UNIT_QUARTERS,
        "quad_units": QUAD_UNITS,
        "element_stage_units": ELEMENT_STAGE_UNITS,
        "lds_bytes": shared_bytes(plan, kernel),
        # dot products of f16 take denormals for 0, and so do the matrix units of some archs
        "flushes_halves": kernel.pairs or plan.target.hip.flushes_halves,
        "products": products,
        "weight_structs": list({weight.name: weight for weight in weights}.values()),
        "parameters": parameters(plan, kernel),
        "x": writer.x() if work.x is not None and work.sections else None,
        "epilogue": writer.epilogue(products) if _has_epilogue(kernel) else None,
        "width": kernel.section.width if work.sections else 0,
        "k": work.x.width if work.x is not None else 0,
        "experts": writer.experts(products),
        **transposed_variables(plan, kernel),
        **rows_variables(plan, kernel),
        **tile_halves_variables(plan, kernel),
        **matrix_variables(plan, kernel),
        **decoded,
    }
    if kernel.schedule == ROWS:
        result |= writer.rows()
    if kernel.schedule == GEMV_MATRIX:  # the sizes count the memory that the text declares
        assert row_values(work) == len(result["x"]["row_fields"])
    result["needs"] = _needs(kernel, weights, writer, _x_statements(result))
    result["needs"]["long_sums"] = sums.keeps_lost or kernel.schedule == ADD_SPLITS
    result["comment"] = writer.comment()
    return result | {"elementary": elementary_functions(writer.values.operations)}


def _has_epilogue(kernel: HipKernel) -> bool:
    return any(section.stores for section in kernel.work.sections)


def _x_statements(result: dict[str, Any]) -> tuple[Statement, ...]:
    """Return the statements of x at a column."""
    x = result["x"]
    statements: tuple[Statement, ...] = x["statements"] if x else result.get("x_statements", ())
    return statements


def _needs(
    kernel: HipKernel, weights: list[KernelWeight], writer: "_Writer", of_x: tuple[Statement, ...]
) -> dict[str, Any]:
    """Return which of the common functions a text calls; of_x: the statements of x at a column."""
    adds_up = adds_up_blocks(kernel)
    splits_x = bool(kernel.f16_terms) and kernel.schedule not in _STAGED_TERMS
    loads_fours = (
        splits_x and kernel.work.x is not None and kernel.work.x.width % UNIT_ELEMENTS == 0
    )
    fours = {(s.float_type, s.is_aligned) for s in of_x if s.at_column and loads_fours}
    work = kernel.work
    stores = [*work.rows, *(store for section in work.sections for store in section.stores)]
    stores += [work.decoded] if work.decoded is not None else []
    tiles = [w for w in weights if w.is_tiles and "halves" in w.functions]
    return {
        "block_of_rows": kernel.schedule not in {DEQUANTIZE, SORT_EXPERTS},
        "sum_of_lanes": kernel.lanes > 1 or adds_up,
        "block_sum": adds_up,
        "block_largest": finds_largest(kernel),
        "block_maximum": finds_maximum(kernel),
        "rolled": splits_x or kernel.schedule in _ROLLED,
        "unaligned": sorted(set().union(*(w.unaligned for w in weights)), reverse=True),
        "minimum": any(w.has_m for w in weights),
        "half_minimum": any(w.has_m and w.halves for w in weights),
        "e8m0": any(w.is_e8m0 for w in weights),
        "byte_pairs": any(w.tiled.has_byte_pairs for w in tiles),
        "table_pairs": any(w.table and w.tiled.has_byte_pairs for w in tiles),
        "of_four": writer.plan.target.hip.is_nvidia and bool(kernel.x_sums),
        "centre": any(w.has_m for w in tiles),
        "whole_units": not all(w.is_tiles and w.unit_sub_blocks > 1 for w in weights),
        "half_units": any(w.is_tiles and w.unit_sub_blocks > 1 for w in weights),
        "most_x": 100 if any(w.is_tiles for w in weights) else 117,
        "fours": sorted(fours),
        "loaded": writer.values.loaded,
        "stored": {store.buffer.float_type for store in stores},
    }


@dataclass
class _Writer:
    """Writes the parts of a kernel as values that templates print."""

    plan: HipPlan
    kernel: HipKernel
    values: HipValues = field(init=False)

    def __post_init__(self) -> None:
        self.values = HipValues(self.plan.graph, self.kernel)
        self._names = c_names(self.plan.graph.names)

    def comment(self) -> list[str]:
        """Return the head of a text: what it computes, in the names of the code."""
        kernel = self.kernel
        title = f"{kernel.work.name} for {self.plan.target}, {kernel.rows_class}, made by q4jit"
        return [title, *self.plan.describe(kernel, self._label, buffer_name)]

    def _label(self, node: Node) -> str:
        x = self.kernel.work.x
        if self.kernel.schedule == ADD_SPLITS:  # its products were computed by the kernel before it
            x = self.kernel.section.products[0].operands[0]
        return "x_value" if node is x else self.values.names.of(node)

    def decoded(self) -> dict[str, Any]:
        """Return the weight that a kernel only decodes, and the ids of its rows."""
        store = self.kernel.work.decoded
        if store is None:
            return {}
        return {
            "weight": self._weight(store.node),
            "argument": self._names[store.node.arg],
            "ids": [self._names[n.arg] for n in store.node.operands],
            "buffer": buffer_name(store.buffer),
            "float_type": store.buffer.float_type,
        }

    def products(self) -> list[Product]:
        """Return the products of a kernel with the weights that they read."""
        nodes = [p for s in self.kernel.work.sections for p in s.products]
        names = self.values.names.name_products(nodes)
        return [
            Product(n, names[n.id], self.values.names.of(n), self._names[n.arg], self._weight(n))
            for n in nodes
        ]

    def experts(self, products: list[Product]) -> dict[str, Any] | None:
        """Return the ids of experts, and the weights that have a matrix for each."""
        ids = self.kernel.work.chosen or self.kernel.work.sorted_by
        if ids is None:
            return None
        specs = {p.argument: p.weight.spec for p in products}
        counts = [spec.experts for spec in specs.values()]
        return {
            "ids": self._names[ids.arg],
            "index": expert_index(self.kernel.work),
            "count": min(counts, default=self.kernel.experts),
            "weights": [(a, matrix_bytes(spec, self.kernel.layout)) for a, spec in specs.items()],
        }

    def _weight(self, node: Node) -> KernelWeight:
        spec = self.plan.weight(node.arg)
        called = called_functions(self.kernel, spec.block_format)
        k_name = str(spec.k) if node.transposed else "K"
        return KernelWeight(spec, self.kernel.layout, called, k_name)

    def x(self) -> dict[str, Any]:
        """Return the prologue: statements of the row if it has sums to share, and at a column."""
        x = self.kernel.work.x
        assert x is not None
        of_row = self.values.of_row([x], {})
        if not any(isinstance(statement, Sum) for statement in of_row):
            of_row = ()
        known = {s.id: f"s.{s.name}" for s in of_row if not s.is_bool}
        statements, (expression,) = self.values.at([x], known)
        used = {text for s in statements for text in s.operands} | {expression}
        return {
            "row_statements": of_row,
            "row_fields": [s.name for s in of_row if f"s.{s.name}" in used],
            "statements": statements,
            "expression": expression,
        }

    def epilogue(self, products: list[Product]) -> dict[str, Any]:
        """Return what leads from the products at a row and a column to the stored values."""
        stores = self.kernel.section.stores
        known = {p.node.id: p.result for p in products}
        statements, expressions = self.values.at([s.node for s in stores], known)
        pairs = zip(stores, expressions, strict=True)
        stored = [_stored(s, e, self.kernel.work) for s, e in pairs]
        return {"statements": statements, "stores": stored}

    def rows(self) -> dict[str, Any]:
        """Return the statements of a `rows` kernel: of the row, then of every stored value."""
        kernel, x, stores = self.kernel, self.kernel.work.x, self.kernel.work.rows
        roots = [s.node for s in stores] + ([x] if x is not None else [])
        of_row = self.values.of_row(roots, {})
        known = {statement.id: statement.name for statement in of_row}
        scalars, wide = [], []
        for store in stores:
            statements, (expression,) = self.values.at([store.node], known)
            stored = _stored(store, expression, kernel.work)
            if store.node.width == 1:
                scalars.append(stored)
            else:
                wide.append(stored | {"statements": statements, "width": store.node.width})
        x_statements: tuple[Statement, ...] = ()
        x_expression = ""
        if (kernel.bf16_terms or kernel.int8 or kernel.f16_terms) and x is not None:
            x_statements, (x_expression,) = self.values.at([x], known)
        return {
            "row_statements": of_row,
            "row_stores": scalars,
            "wide_stores": wide,
            "x_statements": x_statements,
            "x_expression": x_expression,
        }


def _stored(store: Store, expression: str, work: Kernel) -> dict[str, Any]:
    return {
        "buffer": buffer_name(store.buffer),
        "index": store_index(store.node, store.buffer.width, work),
        "expression": expression,
        "float_type": store.buffer.float_type,
    }
