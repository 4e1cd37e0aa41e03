"""Split a graph into kernels."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from math import floor
from typing import Final

from q4jit.frontend.graph import DECODED, REDUCTIONS, Graph, Node, reachable
from q4jit.frontend.refusals import refuse
from q4jit.plan.kernels import Buffer, Kernel, Section, Store

_READ_DIRECTLY: Final = frozenset({"load", "scalar", "const"})  # never through a buffer

_STORED: Final = REDUCTIONS | {"reshape", "inner_sum"}  # they need their operand in memory

_COSTLY: Final = REDUCTIONS | {"matmul"}  # kept rather than computed again


def split(graph: Graph) -> tuple[tuple[Kernel, ...], tuple[int, ...]]:
    """Return the kernels of a graph in the order in which they run, and its temporaries' widths."""
    results = enumerate(zip(graph.outputs, graph.result_types, strict=True))
    outputs = [
        Store(n, Buffer("output", i, n.width, float_type, n.copies))
        for i, (n, float_type) in results
    ]
    kernels: list[Kernel] = []
    temps: list[int] = []
    for varies in (False, True):
        stores = [s for s in outputs if s.node.varies is varies and s.node.op not in DECODED]
        if stores:
            splitter = _Splitter(stores, temps)
            kernels += [replace(k, uniform=not varies) for k in splitter.kernels()]
    kernels += [
        Kernel(
            "",
            (),
            None,
            (),
            (),
            uniform=not s.node.varies,
            decoded=s,
            copies=s.node.copies if s.node.op == "rows" else 1,
        )
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
    """Splits the graph of some outputs into kernels, which count from 1.

    Every value has a *home*: j for a value in the epilogue of kernel j, j + ½ for a value that is
    computed row by row after kernel j, and 0 for a value that needs no product. All homes but the
    whole numbers from 1 are *row values*: a rows phase computes them.

    Attributes:
        outputs: the results to compute.
        temps: widths of the temporary buffers; `kernels` appends to it.
    """

    outputs: Sequence[Store]
    temps: list[int]
    _home: dict[int, float] = field(default_factory=dict)
    _kernel_of: dict["_Shared", int] = field(default_factory=dict)
    _copies_of: dict[int, int] = field(default_factory=dict)
    _sums: dict[int, tuple[Node, ...]] = field(default_factory=dict)

    def kernels(self) -> list[Kernel]:
        """Return the kernels in the order in which they run."""
        nodes = reachable(tuple(s.node for s in self.outputs))
        # operands have smaller ids, so an x comes after every x that it depends on
        xs = {_shared_by(n): n.operands[0] for n in nodes if n.op == "matmul"}
        self._kernel_of = {key: j for j, key in enumerate(sorted(xs), 1)}
        self._copies_of = {
            self._kernel_of[_shared_by(n)]: n.copies for n in nodes if n.op == "matmul"
        }
        for node in nodes:
            self._home[node.id] = self._home_of(node)
            self._sums[node.id] = self._sums_of(node)
        stores = self._stores(nodes)
        kernels: list[Kernel] = []
        for key, j in self._kernel_of.items():
            kernels += self._kernels_of(j, xs[key], nodes, stores)
        return kernels + list(self._of_rows(self._rows(len(xs) + 1, stores), stores))

    def _home_of(self, node: Node) -> float:
        if node.op == "matmul":
            return self._kernel_of[_shared_by(node)]
        home = max((self._home[n.id] for n in node.operands), default=0.0)
        in_epilogue = home == floor(home) and home > 0
        if node.op == "inner_sum" and not in_epilogue:
            refuse(
                "add up vectors of experts that depend on a reduction, or on another product",
                "return them, and add them up in another function",
            )
        if not in_epilogue:
            return home
        # an operand of another width must be stored before its columns can be combined
        mixed = any(self._home[n.id] == home and n.width != node.width for n in node.operands)
        # other rows than the kernel's: the sum of an inner axis, or vectors beside a row's products
        other_rows = node.copies != self._copies_of[floor(home)]
        return home + 0.5 if node.op in _STORED or mixed or other_rows else home

    def _phase(self, node: Node) -> int:
        """Return the number of the kernel whose rows phase computes a row value."""
        return floor(self._home[node.id]) + 1

    def _in_epilogue(self, node: Node) -> bool:
        home = self._home[node.id]
        return home > 0 and home == floor(home)

    def _stores(self, nodes: list[Node]) -> dict[int, Store]:
        """Return every value that is written to memory: outputs, and values for later phases."""
        crossing: dict[int, Node] = {}
        for node in nodes:
            leaving = (n for n in node.operands if self._crosses(n, node))
            crossing |= {m.id: m for n in leaving for m in self._numbers_of(n)}
            crossing |= {n.id: n for n in self._sums_kept_for(node)}
        # a result that is rounded cannot serve a later kernel
        stores = {s.node.id: s for s in self.outputs if s.buffer.is_exact}
        for node in self._minimal(crossing, nodes):
            if node.id not in stores:
                buffer = Buffer("temp", len(self.temps), node.width, copies=node.copies)
                stores[node.id] = Store(node, buffer)
                self.temps.append(node.width * node.copies)
        return stores

    def _crosses(self, operand: Node, user: Node) -> bool:
        return self._in_epilogue(operand) and self._home[user.id] != self._home[operand.id]

    def _numbers_of(self, node: Node) -> list[Node]:
        """Return the numbers that a value of an epilogue is kept as.

        Buffers hold numbers. A truth value is computed again from the numbers that it compares.
        """
        numbers: list[Node] = []
        stack, seen = [node], {node.id}  # no recursion: an unrolled loop makes long chains
        while stack:
            n = stack.pop()
            if not n.is_bool:
                numbers.append(n)
                continue
            fresh = [o for o in n.operands if self._in_epilogue(o) and o.id not in seen]
            seen.update(o.id for o in fresh)
            stack += fresh
        return numbers

    def _sums_kept_for(self, node: Node) -> Iterable[Node]:
        """Return the sums that `node` depends on and that an earlier phase computes."""
        if self._in_epilogue(node) and node.op != "matmul":
            roots = [n for n in node.operands if not self._in_epilogue(n)]
            return self._sums_behind(roots)
        phase = self._kernel_of[_shared_by(node)] if node.op == "matmul" else self._phase(node)
        return (s for s in self._sums_behind(node.operands) if self._phase(s) < phase)

    def _sums_behind(self, roots: Iterable[Node]) -> list[Node]:
        """Return the sums that row values are computed from."""
        return list(dict.fromkeys(s for node in roots for s in self._sums[node.id]))

    def _sums_of(self, node: Node) -> tuple[Node, ...]:
        if self._in_epilogue(node):
            return ()
        return (node,) if node.op in REDUCTIONS else tuple(self._sums_behind(node.operands))

    def _minimal(self, crossing: dict[int, Node], nodes: list[Node]) -> list[Node]:
        """Return the values without those that follow from others without a product or a sum."""
        kept = dict(crossing)
        summed = {n.operands[0].id for n in nodes if n.op == "inner_sum"}
        for node in sorted(crossing.values(), key=lambda n: -n.id):
            if node.op in _COSTLY or node.id in summed:
                continue
            if self._recomputable(node, kept.keys() - {node.id}):
                del kept[node.id]
        return [kept[i] for i in sorted(kept)]

    def _recomputable(self, node: Node, available: Set[int]) -> bool:
        """Whether a value follows from available ones, without a product or a sum."""
        inside = reachable(node.operands, available)
        return all(n.op not in _COSTLY for n in inside)

    def _rows(self, j: int, stores: dict[int, Store]) -> tuple[Store, ...]:
        """Return the values that the rows phase of kernel j writes."""
        return tuple(
            s
            for s in self._written(stores)
            if not self._in_epilogue(s.node) and self._phase(s.node) == j
        )

    def _written(self, stores: dict[int, Store]) -> list[Store]:
        """Return every store by id. A value that is returned twice is written to two buffers."""
        distinct = dict.fromkeys([*stores.values(), *self.outputs])
        return sorted(distinct, key=lambda s: s.node.id)

    def _of_rows(self, rows: tuple[Store, ...], stores: dict[int, Store]) -> Iterable[Kernel]:
        """Yield the kernels of values without a product, one per number of vectors in a row."""
        for copies in sorted({s.node.copies for s in rows}, reverse=True):
            own = tuple(s for s in rows if s.node.copies == copies)
            loads = self._needed(own, None, (), stores)
            yield Kernel("", own, None, (), loads, uniform=False, copies=copies)

    def _kernels_of(
        self, j: int, x: Node, nodes: list[Node], stores: dict[int, Store]
    ) -> Iterable[Kernel]:
        """Yield kernel j, after one for values of its rows phase that are vectors of its rows."""
        copies = self._copies_of[j]
        rows = self._rows(j, stores)
        yield from self._of_rows(tuple(s for s in rows if s.node.copies > copies), stores)
        rows = tuple(s for s in rows if s.node.copies <= copies)
        epilogue = [s for s in self._written(stores) if self._home[s.node.id] == j]
        products = [n for n in nodes if n.op == "matmul" and self._home[n.id] == j]
        sections = tuple(self._sections(epilogue, {p.id: p for p in products}, stores))
        loads = self._needed(rows, x, sections, stores)
        yield Kernel("", rows, x, sections, loads, uniform=False, copies=copies)

    def _sections(
        self, epilogue: list[Store], products: dict[int, Node], stores: dict[int, Store]
    ) -> Iterable[Section]:
        """Yield the sections: stores that share products, so that each is computed once."""
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
        used, seen, stack = set[int](), set[int](), [node]
        while stack:
            n = stack.pop()
            if n.id in seen:
                continue
            seen.add(n.id)
            if n.id in products:
                used.add(n.id)
            elif self._home[n.id] == self._home[node.id]:
                stack.extend(n.operands)
        return used

    def _needed(
        self,
        rows: tuple[Store, ...],
        x: Node | None,
        sections: tuple[Section, ...],
        stores: dict[int, Store],
    ) -> tuple[Store, ...]:
        """Return the values of earlier kernels that a kernel reads from buffers."""
        rows_ids = {s.node.id for s in rows}
        own = rows_ids | {t.node.id for s in sections for t in s.stores}
        loads: dict[int, Store] = {}

        def walk(roots: list[Node], stop: set[int]) -> None:
            stack, seen = roots, set(stop)
            while stack:
                node = stack.pop()
                if node.id in seen:
                    continue
                seen.add(node.id)
                if node.id in stores and node.id not in own and node.op not in _READ_DIRECTLY:
                    loads[node.id] = stores[node.id]
                else:
                    stack.extend(node.operands)

        walk([s.node for s in rows] + ([] if x is None else [x]), set())
        products = {p.id for s in sections for p in s.products}
        walk([t.node for s in sections for t in s.stores], products | rows_ids)
        return tuple(loads[i] for i in sorted(loads))


_Shared = tuple[int, bool, int]


def _shared_by(product: Node) -> _Shared:
    """Return what the products of a kernel share: x, whether w is transposed, and the ids."""
    chosen = -1 if product.chosen is None else product.chosen.id
    return product.operands[0].id, product.transposed, chosen
