"""The variables of the templates: everything that the text of a planned kernel is made of."""

from dataclasses import dataclass, field
from typing import Any

from q4jit.frontend.graph import Node
from q4jit.hip.elementary import elementary_functions
from q4jit.hip.kernel import BOUNDED_THREADS, MAX_GRID_Y, ROWS, TILE_HALVES, HipKernel, HipPlan
from q4jit.hip.memory import adds_up_blocks, finds_largest, finds_maximum
from q4jit.hip.values import (
    HipValues,
    Step,
    Sum,
    buffer_name,
    c_names,
    parameters,
    store_index,
    variable,
)
from q4jit.hip.weight import Product, Weight
from q4jit.plan.kernels import Store


def variables(plan: HipPlan, kernel: HipKernel) -> dict[str, Any]:
    """Return what the templates are given for a kernel, but for the platform."""
    writer = _Writer(plan, kernel)
    work = kernel.work
    products = [writer.product(p) for s in work.sections for p in s.products]
    decoded = writer.decoded()
    weights = [p.weight for p in products] + ([decoded["weight"]] if decoded else [])
    found: dict[str, Any] = {
        "kernel": kernel,
        "arch": plan.target.hip,
        "schedule": kernel.schedule,
        "max_grid_y": MAX_GRID_Y,
        "bounded_threads": BOUNDED_THREADS,
        # dot products of f16 take denormals for 0, and so do the matrix units of some archs
        "flushes_halves": kernel.pairs or plan.target.hip.flushes_halves,
        "comment": _comment(plan, kernel),
        "products": products,
        "weight_structs": list({weight.name: weight for weight in weights}.values()),
        "parameters": parameters(plan, kernel),
        "x": writer.x() if work.sections else None,
        "epilogue": writer.epilogue(products) if work.sections else None,
        "width": kernel.section.width if work.sections else 0,
        "k": work.x.width if work.x is not None else 0,
        "needs": _needs(kernel, weights),
        **decoded,
    }
    if kernel.schedule == ROWS:
        found |= writer.rows()
    return found | {"elementary": elementary_functions(writer.values.operations)}


def _comment(plan: HipPlan, kernel: HipKernel) -> list[str]:
    title = f"{kernel.work.name} for {plan.target}, {kernel.rows_class}, made by q4jit"
    return [title, *plan.describe(kernel)]


def _needs(kernel: HipKernel, weights: list[Weight]) -> dict[str, bool]:
    """The common functions that a text calls."""
    return {
        "block_sum": adds_up_blocks(kernel),
        "block_largest": finds_largest(kernel),
        "block_maximum": finds_maximum(kernel),
        "unaligned": any(not w.is_planar and not w.float_bytes for w in weights),
        "minimum": any(w.has_m for w in weights),
        "fours": bool(kernel.f16_terms) and kernel.schedule != TILE_HALVES,
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

    def decoded(self) -> dict[str, Any]:
        """The weight that a kernel only decodes, and for which ids."""
        store = self.kernel.work.decoded
        if store is None:
            return {}
        return {
            "weight": self._weight(store.node),
            "argument": self._names[store.node.arg],
            "ids": [self._names[n.arg] for n in store.node.operands],
            "buffer": buffer_name(store.buffer.kind, store.buffer.index),
        }

    def product(self, node: Node) -> Product:
        """A product, and the weight that it reads."""
        return Product(node, variable(node.id), self._names[node.arg], self._weight(node))

    def _weight(self, node: Node) -> Weight:
        return Weight(self.plan.weight(node.arg), self.kernel.layout)

    def x(self) -> dict[str, Any]:
        """The prologue: steps for the row, where sums make them worth sharing, and at a column."""
        x = self.kernel.work.x
        assert x is not None
        rows = self.values.row_steps([x], {})
        if not any(isinstance(step, Sum) for step in rows):
            rows = ()
        known = {step.id: f"s.{step.name}" for step in rows if not step.is_bool}
        steps, (expression,) = self.values.at([x], known)
        used = {text for step in steps for text in step.operands} | {expression}
        return {
            "row_steps": rows,
            "row_fields": [step.name for step in rows if f"s.{step.name}" in used],
            "steps": steps,
            "expression": expression,
        }

    def epilogue(self, products: list[Product]) -> dict[str, Any]:
        """From the products at a row and a column to the values that are stored."""
        stores = self.kernel.section.stores
        known = {p.node.id: p.name for p in products}
        steps, expressions = self.values.at([s.node for s in stores], known)
        stored = [_stored(s, e) for s, e in zip(stores, expressions, strict=True)]
        return {"steps": steps, "stores": stored}

    def rows(self) -> dict[str, Any]:
        """The steps of a `rows` kernel: of the row, then of every value that is stored."""
        kernel, x, stores = self.kernel, self.kernel.work.x, self.kernel.work.rows
        roots = [s.node for s in stores] + ([x] if x is not None else [])
        row_steps = self.values.row_steps(roots, {})
        known = {step.id: step.name for step in row_steps}
        scalars, wide = [], []
        for store in stores:
            steps, (expression,) = self.values.at([store.node], known)
            stored = _stored(store, expression)
            if store.node.width == 1:
                scalars.append(stored)
            else:
                wide.append(stored | {"steps": steps, "width": store.node.width})
        x_steps: tuple[Step, ...] = ()
        x_expression = ""
        if (kernel.bf16_terms or kernel.int8 or kernel.f16_terms) and x is not None:
            x_steps, (x_expression,) = self.values.at([x], known)
        return {
            "row_steps": row_steps,
            "row_stores": scalars,
            "wide_stores": wide,
            "x_steps": x_steps,
            "x_expression": x_expression,
        }


def _stored(store: Store, expression: str) -> dict[str, Any]:
    return {
        "buffer": buffer_name(store.buffer.kind, store.buffer.index),
        "index": store_index(store.node, store.buffer.width),
        "expression": expression,
    }
