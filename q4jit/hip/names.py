"""The names in a HIP text: arguments as C++ takes them, and a variable for each value."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from q4jit.frontend.graph import Node
from q4jit.hip.templates import Words, words
from q4jit.plan.kernels import Buffer

RESERVED: Final = frozenset(
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t
    char32_t class compl concept const consteval constexpr constinit const_cast continue co_await
    co_return co_yield decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq
    nullptr operator or or_eq private protected public register reinterpret_cast requires return
    short signed sizeof static static_assert static_cast struct switch template this thread_local
    throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while
    xor xor_eq
    u8 u16 u32 u64 i8 i16 i32 i64 u32x4 f32x4 f32x8 bf16x4 bf16x8 bf16x16 fragment accumulator
    CLUSTER KERNEL DEVICE SHARED SHARED_AT_512 UNROLL ROLLED MEETING WAVE BLOCK_SIZE Arguments
    RowValues compute
    m x_values x_terms x_rough x_quants x_scales x_sums host_arguments linux unix
    """.split()
)
"""Names that no argument keeps: words of C++, types, macros, and buffers of our own.

An argument is a parameter of the kernel and a member of `Arguments`. It is never in scope in a
function's body, so it may have the name of anything else.
"""

# A value is named after its operation, with a number. The prelude defines exp_f32, not exp1.
_OPERATION_NAMES: Final = {
    "neg": "negative",
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "sqrt": "root",
    "abs": "magnitude",
    "add": "sum",
    "sub": "difference",
    "mul": "product",
    "div": "quotient",
    "maximum": "larger",
    "minimum": "smaller",
    "lt": "is_less",
    "le": "is_at_most",
    "gt": "is_greater",
    "ge": "is_at_least",
    "eq": "is_equal",
    "ne": "is_unequal",
    "and": "both",
    "or": "either",
    "not": "opposite",
    "where": "choice",
    "sum": "row_sum",
    "max": "row_maximum",
    "reshape": "reshaped",
    "inner_sum": "vector_sum",
}
_NOUNS: Final = "|".join(_OPERATION_NAMES.values())
VALUE: Final = re.compile(rf"({_NOUNS})\d+|\w+_(element|product)(_\d+)?")
"""What variables of values look like; templates use no such names themselves."""


def c_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a function's arguments, ASCII identifiers, as C++ takes them."""
    taken: list[str] = []
    for name in names:
        is_buffer = re.fullmatch(r"(output|temp)\d+", name)
        candidate = f"{name}_" if name in RESERVED or is_buffer or name.startswith("_") else name
        while candidate in taken:
            candidate += "_"
        taken.append(candidate)
    return tuple(taken)


def buffer_name(buffer: Buffer) -> str:
    """Return the parameter of a buffer: `output0`, `temp1`; `x_values` is the stored prologue."""
    return "x_values" if buffer.kind == "x" else f"{buffer.kind}{buffer.index}"


class ValueNames:
    """Names the values of a kernel after the user's arguments and NumPy's operations."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = c_names(arguments)
        self._names: dict[int, str] = {}
        self._vectors: dict[tuple[int, int], str] = {}
        self._counts = Counter[str]()

    def of(self, node: Node) -> str:
        """Return the variable that holds a value that the kernel computes or loads."""
        if node.id not in self._names:
            self._names[node.id] = self._new(node)
        return self._names[node.id]

    def in_buffer(self, node: Node, buffer: Buffer) -> str:
        """Return the variable that holds a value that the kernel loads from a buffer."""
        if node.id not in self._names:
            kind = "x" if buffer.kind == "x" else buffer_name(buffer)
            self._names[node.id] = self._unique(f"{kind}_element")
        return self._names[node.id]

    def of_vector(self, node: Node, buffer: Buffer, vector: int) -> str:
        """Return the variable that holds an element of one of the vectors that a node adds up."""
        key = node.id, vector
        if key not in self._vectors:
            self._vectors[key] = self._unique(f"{buffer_name(buffer)}_element_{vector}")
        return self._vectors[key]

    def name_products(self, products: Sequence[Node]) -> dict[int, str]:
        """Return the names of products, by id: those of their weights.

        Where products share a weight, the first columns of their slices tell them apart. A result
        is called `gate_product`; templates call other things of a product `gate_sums` or
        `load_gate`.
        """
        uses = Counter(p.arg for p in products)
        taken = set(words().names - {"w"})  # what templates call w is never in scope with a result
        stems: dict[int, str] = {}
        for product in products:
            stem = self._arguments[product.arg]
            stem += "weight" if stem.endswith("_") else ""
            stem += f"_{product.start}" if uses[product.arg] > 1 else ""
            while not taken.isdisjoint(_derived(stem, words())):
                stem += "_weight"
            taken |= _derived(stem, words())
            stems[product.id] = stem
            self._names[product.id] = f"{stem}_product"
        return stems

    def _new(self, node: Node) -> str:
        if node.op == "load":
            start = f"_{node.start}" if node.start else ""
            return self._unique(f"{self._arguments[node.arg]}_element{start}")
        noun = _OPERATION_NAMES[node.op]
        self._counts[noun] += 1
        return f"{noun}{self._counts[noun]}"

    def _unique(self, name: str) -> str:
        while name in self._names.values() or name in self._vectors.values():
            name += "_"
        return name


def _derived(stem: str, template_words: Words) -> set[str]:
    """Return what templates make of a product's name."""
    before = {prefix + stem for prefix in template_words.before_product}
    return {stem, *before, *(stem + suffix for suffix in template_words.after_product)}
