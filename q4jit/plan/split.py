"""Splitting a graph into kernels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import floor
from typing import Final

from q4jit.frontend.graph import DECODED, Graph, Node, reachable
from q4jit.plan.kernels import Buffer, Kernel, Section, Store

_ALWAYS_AT_HAND: Final = frozenset({"load", "scalar", "const"})


def split(graph: Graph) -> tuple[tuple[Kernel, ...], tuple[int, ...]]:
    """The kernels of a graph in the order in which they run, and the widths of its temporaries."""
    outputs = [Store(node, Buffer("output", i, node.width)) for i, node in enumerate(graph.outputs)]
    kernels: list[Kernel] = []
    temps: list[int] = []
    for varies in (False, True):
        part = [s for s in outputs if s.node.varies is varies and s.node.op not in DECODED]
        if part:
            splitter = _Splitter(part, temps)
            kernels += [replace(k, uniform=not varies) for k in splitter.kernels()]
    kernels += [
        Kernel("", (), None, (), (), uniform=not s.node.varies, decoded=s)
        for s in outputs
        if s.node.op in DECODED
    ]
    named = (
        replace(kernel, name=graph.name if len(kernels) == 1 else f"{graph.name}_{i}")
        for i, kernel in enumerate(kernels)
    )
    return tuple(named), tuple(temps)


@dataclass
class _Splitter:
    """Splits the graph of some outputs into kernels.

    Every value has a *home*: j for values of the epilogue of kernel j (1, 2, …), j + ½ for values
    known row by row once kernel j has run, 0 for those that need no product.
    """

    outputs: Sequence[Store]
    temps: list[int]
    _home: dict[int, float] = field(default_factory=dict)
    _kernel_of_x: dict[int, int] = field(default_factory=dict)
    _sums: dict[int, tuple[Node, ...]] = field(default_factory=dict)

    def kernels(self) -> list[Kernel]:
        nodes = reachable(tuple(s.node for s in self.outputs))
        # ids are topological, so an x comes after every x that it depends on
        xs = {n.operands[0].id: n.operands[0] for n in nodes if n.op == "matmul"}
        self._kernel_of_x = {x: j for j, x in enumerate(sorted(xs), 1)}
        for node in nodes:
            self._home[node.id] = self._home_of(node)
            self._sums[node.id] = self._sums_of(node)
        stores = self._stores(nodes)
        kernels = [self._kernel(j, xs[x], nodes, stores) for x, j in self._kernel_of_x.items()]
        last = self._rows(len(xs) + 1, stores)
        if last:
            loads = self._needed(last, None, (), stores)
            kernels.append(Kernel("", last, None, (), loads, uniform=False))
        return kernels

    def _home_of(self, node: Node) -> float:
        if node.op == "matmul":
            return self._kernel_of_x[node.operands[0].id]
        home = max((self._home[n.id] for n in node.operands), default=0.0)
        in_epilogue = home == floor(home) and home > 0
        if not in_epilogue:
            return home
        mixed = any(self._home[n.id] == home and n.width != node.width for n in node.operands)
        return home + 0.5 if node.op in {"sum", "reshape"} or mixed else home

    def _phase(self, node: Node) -> int:
        """The kernel whose rows phase computes a value of the rows domain."""
        return floor(self._home[node.id]) + 1

    def _in_epilogue(self, node: Node) -> bool:
        home = self._home[node.id]
        return home > 0 and home == floor(home)

    def _stores(self, nodes: list[Node]) -> dict[int, Store]:
        """Every value that goes to memory: the outputs and what a later phase reads."""
        crossing: dict[int, Node] = {}
        for node in nodes:
            leaving = (n for n in node.operands if self._crosses(n, node))
            crossing |= {m.id: m for n in leaving for m in self._numbers_of(n)}
            crossing |= {n.id: n for n in self._sums_kept_for(node)}
        stores = {s.node.id: s for s in self.outputs}
        for node in self._minimal(crossing):
            if node.id not in stores:
                stores[node.id] = Store(node, Buffer("temp", len(self.temps), node.width))
                self.temps.append(node.width)
        return stores

    def _crosses(self, operand: Node, user: Node) -> bool:
        return self._in_epilogue(operand) and self._home[user.id] != self._home[operand.id]

    def _numbers_of(self, node: Node) -> list[Node]:
        """What to keep of an epilogue's value.

        Memory holds numbers; a truth value is decided again from those that it compares.
        """
        found: list[Node] = []
        stack, seen = [node], {node.id}  # no recursion: an unrolled loop makes long chains
        while stack:
            n = stack.pop()
            if not n.is_bool:
                found.append(n)
                continue
            fresh = [o for o in n.operands if self._in_epilogue(o) and o.id not in seen]
            seen.update(o.id for o in fresh)
            stack += fresh
        return found

    def _sums_kept_for(self, node: Node) -> Iterable[Node]:
        """The sums that `node` reads and that another phase than its own computes."""
        if self._in_epilogue(node) and node.op != "matmul":
            roots = [n for n in node.operands if not self._in_epilogue(n)]
            return self._sums_behind(roots)
        phase = self._kernel_of_x[node.operands[0].id] if node.op == "matmul" else self._phase(node)
        return (s for s in self._sums_behind(node.operands) if self._phase(s) < phase)

    def _sums_behind(self, roots: Iterable[Node]) -> list[Node]:
        """The sums that values of the rows domain are computed from."""
        return list(dict.fromkeys(s for node in roots for s in self._sums[node.id]))

    def _sums_of(self, node: Node) -> tuple[Node, ...]:
        if self._in_epilogue(node):
            return ()
        return (node,) if node.op == "sum" else tuple(self._sums_behind(node.operands))

    def _minimal(self, crossing: dict[int, Node]) -> list[Node]:
        """Leave out what can be recomputed from the others without a product or a sum."""
        kept = dict(crossing)
        for node in sorted(crossing.values(), key=lambda n: -n.id):
            if node.op in {"matmul", "sum"}:
                continue
            available = kept.keys() - {node.id}
            if self._recomputable(node, available):
                del kept[node.id]
        return [kept[i] for i in sorted(kept)]

    def _recomputable(self, node: Node, available: Iterable[int]) -> bool:
        have = set(available)
        stack = list(node.operands)
        while stack:
            n = stack.pop()
            if n.id in have:
                continue
            if n.op in {"matmul", "sum"}:
                return False
            stack.extend(n.operands)
        return True

    def _rows(self, j: int, stores: dict[int, Store]) -> tuple[Store, ...]:
        return tuple(
            s
            for s in self._written(stores)
            if not self._in_epilogue(s.node) and self._phase(s.node) == j
        )

    def _written(self, stores: dict[int, Store]) -> list[Store]:
        """Every store: a value that is returned twice goes to two buffers."""
        distinct = dict.fromkeys([*stores.values(), *self.outputs])
        return sorted(distinct, key=lambda s: s.node.id)

    def _kernel(self, j: int, x: Node, nodes: list[Node], stores: dict[int, Store]) -> Kernel:
        rows = self._rows(j, stores)
        epilogue = [s for s in self._written(stores) if self._home[s.node.id] == j]
        products = [n for n in nodes if n.op == "matmul" and self._home[n.id] == j]
        sections = tuple(self._sections(epilogue, {p.id: p for p in products}, stores))
        loads = self._needed(rows, x, sections, stores)
        return Kernel("", rows, x, sections, loads, uniform=False)

    def _sections(
        self, epilogue: list[Store], products: dict[int, Node], stores: dict[int, Store]
    ) -> Iterable[Section]:
        """Group stores that share products, so that each product is computed once."""
        groups: list[tuple[set[int], list[Store]]] = []
        for store in epilogue:
            needs = self._products_of(store.node, products)
            members = [store]
            for group in [g for g in groups if g[0] & needs]:
                groups.remove(group)
                needs |= group[0]
                members = group[1] + members
            groups.append((needs, members))
        for needs, members in groups:
            inside = tuple(products[i] for i in sorted(needs))
            yield Section(inside[0].width, inside, tuple(members))

    def _products_of(self, node: Node, products: dict[int, Node]) -> set[int]:
        found: set[int] = set()
        stack = [node]
        while stack:
            n = stack.pop()
            if n.id in products:
                found.add(n.id)
            elif self._home[n.id] == self._home[node.id]:
                stack.extend(n.operands)
        return found

    def _needed(
        self,
        rows: tuple[Store, ...],
        x: Node | None,
        sections: tuple[Section, ...],
        stores: dict[int, Store],
    ) -> tuple[Store, ...]:
        """The stored values of earlier kernels that a kernel's phases stop at."""
        rows_ids = {s.node.id for s in rows}
        own = rows_ids | {t.node.id for s in sections for t in s.stores}
        found: dict[int, Store] = {}

        def walk(roots: list[Node], stop: set[int]) -> None:
            stack, seen = roots, set(stop)
            while stack:
                node = stack.pop()
                if node.id in seen:
                    continue
                seen.add(node.id)
                if node.id in stores and node.id not in own and node.op not in _ALWAYS_AT_HAND:
                    found[node.id] = stores[node.id]
                else:
                    stack.extend(node.operands)

        walk([s.node for s in rows] + ([] if x is None else [x]), set())
        products = {p.id for s in sections for p in s.products}
        walk([t.node for s in sections for t in s.stores], products | rows_ids)
        return tuple(found[i] for i in sorted(found))
