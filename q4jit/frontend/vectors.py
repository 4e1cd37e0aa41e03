"""The rules of values with several vectors in a row: products with chosen experts.

Such a value is [..., A, n]: its inner axis A is as long as the ids of a row.
"""

from q4jit.errors import TraceError, expected
from q4jit.frontend.builder import Builder
from q4jit.frontend.graph import ELEMENTWISE, Node
from q4jit.frontend.refusals import refuse
from q4jit.frontend.shapes import Shape, broadcast, leading_axes, show_shape
from q4jit.frontend.specs import WeightSpec


def vecmat(builder: Builder, x: Node, arg: int, ids: Node) -> Node:
    """Return x [..., K] times matrices of weight argument number `arg` [E, K, N].

    ids: the matrix of each vector. Raises TraceError if the shapes do not match.
    """
    spec = builder.signature[arg]
    assert isinstance(spec, WeightSpec)
    if not x.shape or x.shape[-1] != spec.k:
        what = f"x [..., {spec.k}] for w [{spec.experts}, {spec.k}, {spec.n}]"
        where = "np.vecmat(x, w[ids])"
        raise TraceError(expected(what, f"x {show_shape(x.shape)}", where=where))
    if fixed_axes(ids.shape) and fixed_axes(x.shape) == 1 and leading_axes(x.shape):
        what = f"x [..., 1, {spec.k}], because ids has several experts for each row"
        cure = "use np.vecmat(x[..., None, :], w[ids])"
        got = f"x {show_shape(x.shape)} with ids {show_shape(ids.shape)}"
        raise TraceError(expected(what, got, where="np.vecmat(x, w[ids])", cure=cure))
    shape = (*broadcast(x.shape[:-1], ids.shape), spec.n)
    product = builder.node("matmul", (builder.number(x), ids), shape, arg=arg)
    builder.products.append(product)
    return product


def with_axis(builder: Builder, node: Node) -> Node:
    """Return a value [..., A] as [..., A, 1]: a number for each of a row's A vectors.

    Raises TraceError for a value that has an inner axis, and unless the value is computed element
    by element from arrays.
    """
    fixed = fixed_axes(node.shape)
    if fixed == 0:
        return builder.add_last(node)
    if fixed > 1:
        refuse(f"add an axis to {show_shape(node.shape)}", "use keepdims=True in a reduction")
    if node.width == 1:
        return expand(builder, node)
    done: dict[int, Node] = {}
    pending = [node]
    while pending:  # no recursion: an unrolled loop makes long chains
        n = pending[-1]
        missing = [o for o in n.operands if o.id not in done] if _is_wide(n) else []
        pending += missing
        if not missing:
            done[n.id] = _turned(builder, n, done)
            pending.pop()
    return done[node.id]


def _is_wide(node: Node) -> bool:
    return node.width > 1 and node.op in ELEMENTWISE


def _turned(builder: Builder, node: Node, done: dict[int, Node]) -> Node:
    """Return a value with an axis of 1 at its end; done: the same for its operands."""
    if node.width == 1:
        return node
    shape = (*node.shape, 1)
    if node.op == "load":
        return builder.load(node.arg, shape, node.start)
    if node.op not in ELEMENTWISE:
        refuse(
            f"add an axis to the result of a product, {show_shape(node.shape)}",
            "return it, and pass it to another function as an argument",
        )
    return builder.node(node.op, tuple(done[n.id] for n in node.operands), shape)


def expand(builder: Builder, node: Node) -> Node:
    """Return a value [..., n] as [..., 1, n]: one vector that all of a row's vectors meet.

    Raises TraceError for a value without columns or with an inner axis.
    """
    if fixed_axes(node.shape) != 1:
        refuse(f"add an axis to {show_shape(node.shape)}", "use x[..., None, :] for x [..., n]")
    shape = (*node.shape[:-1], 1, node.shape[-1])
    return builder.node("expand", (builder.number(node),), shape)


def inner_sum(builder: Builder, node: Node, keepdims: bool) -> Node:
    """Return the sum over the inner axis of products with chosen experts.

    Raises TraceError for other values: kernels add up what an earlier kernel has stored.
    """
    if fixed_axes(node.shape) != 2 or not _is_of_experts(node, builder.of_experts):
        refuse(
            f"add up the axis before the last of {show_shape(node.shape)}",
            "use it for products np.vecmat(x, w[ids]), and for what is computed element by element "
            "from them",
        )
    shape = (*node.shape[:-2], node.shape[-1])
    summed = builder.node("inner_sum", (builder.number(node),), shape)
    return expand(builder, summed) if keepdims else summed


def _is_of_experts(node: Node, known: dict[int, bool]) -> bool:
    """Return whether a value is a product with chosen experts, or element by element one of it.

    known: answers by number of the value, so that long functions do not search again and again.
    """
    pending, seen = [node], {node.id}
    while pending:
        n = pending.pop()
        if n.chosen is not None or known.get(n.id, False):
            known[node.id] = True
            return True
        operands = n.operands if n.op in ELEMENTWISE else ()
        fresh = [o for o in operands if o.id not in seen and known.get(o.id, True)]
        seen.update(o.id for o in fresh)
        pending += fresh
    known.update(dict.fromkeys(seen, False))
    return False


def fixed_axes(shape: Shape) -> int:
    """Return the number of axes after the leading ones."""
    return len(shape) - leading_axes(shape)
