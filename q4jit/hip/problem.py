"""A problem: what is to be scheduled, and what its weights allow. Facts, and no choices."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from q4jit.frontend.graph import Graph
from q4jit.frontend.specs import WeightSpec
from q4jit.hip.classes import MOST_FEW_ROWS, m_class
from q4jit.hip.kernel import F16_TERMS
from q4jit.hip.rules import Rules, rules_of
from q4jit.plan.kernels import Section
from q4jit.plan.options import PlanOptions
from q4jit.targets import HipArch, Target
from q4jit.weights.formats import Format
from q4jit.weights.layouts import TILES16, suits_tiles16


@dataclass(frozen=True)
class Problem:
    """Kernels of a graph that are wanted for a target and m rows of x, as the plan options ask."""

    graph: Graph
    target: Target
    m: int
    plan_options: PlanOptions

    @property
    def arch(self) -> HipArch:
        """The facts of the GPU's arch."""
        return self.target.hip

    @property
    def rules(self) -> Rules:
        """The rules for the GPU's platform."""
        return rules_of(self.arch)

    @functools.cached_property
    def m_class(self) -> int:
        """The class of M."""
        return m_class(self.target, self.m, self.plan_options)

    @property
    def f16_terms(self) -> int:
        """The f16 terms that x is split into."""
        return F16_TERMS[self.plan_options.precision]

    @property
    def may_fold(self) -> bool:
        """Whether tiles round weights to f16, where these suit it."""
        return self.f16_terms == 1 and not self.arch.flushes_halves

    @property
    def in_warpgroups(self) -> bool:
        """Whether four waves multiply together."""
        return self.arch.warpgroups and self.m > MOST_FEW_ROWS

    def weights(self, section: Section) -> list[WeightSpec]:
        """Return the specs of the weights that the products of a section read."""
        specs = [self.graph.signature[product.arg] for product in section.products]
        return [spec for spec in specs if isinstance(spec, WeightSpec)]

    def has_finite_blocks(self, section: Section) -> bool:
        """Whether all weights are whole numbers with finite scales.

        Matrix units and dot products know whole numbers only, and no NaN among scales.
        """
        return all(_is_in_blocks(w) and w.finite for w in self.weights(section))

    def has_endless_scales(self, section: Section) -> bool:
        """Whether Inf or NaN is among the scales of a weight in blocks."""
        return any(_is_in_blocks(w) and not w.finite for w in self.weights(section))

    def suits_matrix(self, section: Section) -> bool:
        """Whether matrix units can compute a section."""
        return self.arch.matrix is not None and self.has_finite_blocks(section)

    def suits_tiles(self, section: Section) -> bool:
        """Whether matrix units can compute a section, with weights stored for their 16 columns."""
        formats = (w.block_format for w in self.weights(section))
        in_layout = self.plan_options.layout in {None, TILES16}
        return in_layout and self.suits_matrix(section) and are_tiles(formats)

    def suits_dot(self, section: Section) -> bool:
        """Whether dot products of int8 can compute a section, and the precision allows it."""
        return self.plan_options.precision == "i8" and self.has_finite_blocks(section)

    def suits_f16(self, section: Section) -> bool:
        """Whether all weights may be rounded to f16, their scales included."""
        return all(w.suits_f16 for w in self.weights(section))


def are_tiles(formats: Iterable[Format]) -> bool:
    """Whether weights of all these formats can be stored for the 16 columns of matrix units."""
    return all(map(suits_tiles16, formats))


def _is_in_blocks(weight: WeightSpec) -> bool:
    return weight.block_format.float_dtype is None
