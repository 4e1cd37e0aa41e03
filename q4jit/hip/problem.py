"""A problem: a graph to schedule, and the facts about its weights that decide what is possible."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from q4jit.frontend.graph import Graph, Node
from q4jit.frontend.specs import ArraySpec, WeightSpec
from q4jit.hip.classes import HALVES_TILE_ROWS, MOST_FEW_ROWS, m_class
from q4jit.hip.kernel import F16_TERMS, QUAD_ELEMENTS, UNIT_ELEMENTS
from q4jit.hip.rules import MOST_TRANSPOSED_PRODUCTS, GpuRules, rules_of
from q4jit.plan.kernels import Section
from q4jit.plan.options import PlanOptions
from q4jit.targets import HipArch, Target
from q4jit.weights.formats import Format
from q4jit.weights.layouts import TILES16
from q4jit.weights.tiles import are_plain, suits_tiles16

_NIBBLE_BITS: Final = 4


@dataclass(frozen=True)
class Problem:
    """A graph that is planned for a target, m rows of x, and plan options."""

    graph: Graph
    target: Target
    m: int
    plan_options: PlanOptions

    @property
    def arch(self) -> HipArch:
        """Return the facts of the GPU's arch."""
        return self.target.hip

    @property
    def rules(self) -> GpuRules:
        """Return the rules for the GPU's arch."""
        return rules_of(self.arch)

    @functools.cached_property
    def m_class(self) -> int:
        """Return the class of M."""
        return m_class(self.target, self.m, self.plan_options)

    @property
    def f16_terms(self) -> int:
        """Return the number of f16 terms that an element of x is split into."""
        return F16_TERMS[self.plan_options.precision]

    @property
    def transposed_f16_terms(self) -> int:
        """Return the f16 terms of x, and of w, for products with `w.T` on matrix units.

        All products of the graph have the same, so that they can share x. `i8` is computed as
        `f32` is, and so are weights that may not be rounded to f16.
        """
        suits = all(w.suits_f16 for w in self.graph.signature if isinstance(w, WeightSpec))
        return 1 if self.plan_options.precision == "f16" and suits else F16_TERMS["f32"]

    def takes_one_term(self, x: Node) -> bool:
        """Return whether one f16 term is all of x: an array of f16 or bf16, as it was passed.

        One row is split in two terms even so: with the constants that were measured for one term
        it took 6 % longer on an H200 (4096 × 4096), while 2 and 8 rows took 7 and 13 % less.
        """
        spec = self.graph.signature[x.arg] if x.op == "load" else None
        is_half = isinstance(spec, ArraySpec) and spec.float_type != "f32"
        return is_half and self.m_class > 1

    def takes_one_tile_term(self, x: Node) -> bool:
        """Return whether one f16 term is all of x in the tiles of `tile_halves`.

        The elements of a row share a scale, a power of two that makes the largest 2^14 to 2^15. One
        term then keeps all bits of an element down to 2^-14, and errs by 2^-25 below, as two terms
        do everywhere. Where denormal terms are lost, it would err by 2^-14.

        Measured on an H200 (4096 × 14336, and two more shapes): one term takes 0.75 of the time of
        two for 32 rows and 0.8 to 1.09 for 16, but 1.14 to 1.25 for 64, and the same for more.
        """
        is_faster = not self.arch.is_nvidia or self.m_class <= HALVES_TILE_ROWS[0]
        return is_faster and self.takes_one_term(x) and not self.arch.flushes_halves

    @property
    def may_fold(self) -> bool:
        """Return whether tiles may round weights to f16, if the weights suit it."""
        return self.f16_terms == 1 and not self.arch.flushes_halves

    @property
    def in_warpgroups(self) -> bool:
        """Return whether four waves multiply together (warpgroups)."""
        return self.arch.warpgroups and self.m > MOST_FEW_ROWS

    def weights(self, section: Section) -> list[WeightSpec]:
        """Return the specs of the weights that the products of a section read."""
        specs = [self.graph.signature[product.arg] for product in section.products]
        return [spec for spec in specs if isinstance(spec, WeightSpec)]

    def has_finite_blocks(self, section: Section) -> bool:
        """Return whether all weights are quants with finite scales.

        Matrix units and dot products multiply quants, which are integers, and apply the scales
        later. An Inf or NaN among the scales would give another result for quants of 0.
        """
        return all(_is_in_blocks(w) and w.finite for w in self.weights(section))

    def has_nonfinite_scales(self, section: Section) -> bool:
        """Return whether a weight in blocks has an Inf or NaN among its scales."""
        return any(_is_in_blocks(w) and not w.finite for w in self.weights(section))

    def suits_matrix(self, section: Section) -> bool:
        """Return whether matrix units can compute a section."""
        return self.arch.matrix is not None and self.has_finite_blocks(section)

    def suits_panels(self, section: Section) -> bool:
        """Return whether matrix units can compute a section from panels of 16 columns."""
        formats = (w.block_format for w in self.weights(section))
        in_layout = self.plan_options.layout in {None, TILES16}
        return in_layout and self.suits_matrix(section) and suit_panels(formats)

    def are_plain(self, section: Section) -> bool:
        """Return whether all weights have blocks like those of Q4_0."""
        return all(are_plain(w.block_format) for w in self.weights(section))

    def has_wide_codes(self, section: Section) -> bool:
        """Return whether a weight has codes of more than four bits."""
        formats = (w.block_format for w in self.weights(section))
        return any(sum(plane.bits for plane in fmt.planes) > _NIBBLE_BITS for fmt in formats)

    def has_transposed(self, section: Section) -> bool:
        """Return whether the graph has products with `w.T` that need another copy than panels.

        That is, of a weight of this section whose blocks are not like those of Q4_0.
        """
        args = {product.arg for product in section.products}
        return not self.are_plain(section) and any(
            node.op == "matmul" and node.transposed and node.arg in args
            for node in self.graph.nodes()
        )

    def x_sums(self, section: Section) -> int:
        """Return the sums of a unit of x that the minima of a section's weights are multiplied by.

        All sections of the graph that need any have the same number, so that they can share x.
        """
        if all(w.block_format.minimum_at is None for w in self.weights(section)):
            return 0
        all_weights = (w for w in self.graph.signature if isinstance(w, WeightSpec))
        formats = (w.block_format for w in all_weights if w.block_format.minimum_at is not None)
        return max(UNIT_ELEMENTS // fmt.sub_block_elements for fmt in formats)

    def suits_transposed_panels(self, section: Section) -> bool:
        """Return whether matrix units can compute products with `w.T` from panels of w.

        Results begin at a quad of w's columns. Few enough products leave registers for their sums.
        """
        return (
            self.arch.is_nvidia
            and self.suits_panels(section)
            and self.are_plain(section)
            and len(section.products) <= MOST_TRANSPOSED_PRODUCTS
            and all(product.start % QUAD_ELEMENTS == 0 for product in section.products)
        )

    def suits_dot(self, section: Section) -> bool:
        """Return whether int8 dot products can compute a section, and the precision allows it."""
        return self.plan_options.precision == "i8" and self.has_finite_blocks(section)

    def suits_f16(self, section: Section) -> bool:
        """Return whether all weights, with their scales, may be rounded to f16."""
        return all(w.suits_f16 for w in self.weights(section))


def suit_panels(formats: Iterable[Format]) -> bool:
    """Return whether weights of all these formats can be stored in panels of 16 columns."""
    return all(map(suits_tiles16, formats))


def _is_in_blocks(weight: WeightSpec) -> bool:
    return weight.block_format.float_type is None
