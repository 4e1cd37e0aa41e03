"""Look up the schedule and constants that were measured for a product, and apply them."""

from dataclasses import replace

from q4jit.errors import TuningError, expected
from q4jit.hip.candidates import candidates, constants_of, schedules_for
from q4jit.hip.kernel import GEMV_MATRIX, TILE_HALVES, HipKernel, HipPlan
from q4jit.hip.problem import Problem
from q4jit.hip.tunings import Choice, Constant, Key, Measured
from q4jit.plan.kernels import Section
from q4jit.plan.options import PlanOptions

_CURE = "run q4jit tune again, which replaces the entry"


def key_of(problem: Problem, section: Section) -> Key:
    """Return the key of the measured constants for the products of a section."""
    k = section.products[0].operands[0].width
    formats = "+".join(weight.format for weight in problem.weights(section))
    return Key(k, section.width, formats, problem.m_class, problem.plan_options.precision)


def keys_of(plan: HipPlan, m: int, plan_options: PlanOptions) -> tuple[Key, ...]:
    """Return the keys of all products of a plan that can be measured, each once."""
    keys = [
        key_of(Problem(plan.graph, plan.target, 1 if work.uniform else m, plan_options), section)
        for work in (kernel.work for kernel in plan.kernels)
        if not work.is_transposed and work.chosen is None and work.copies == 1
        for section in work.sections
    ]
    return tuple(dict.fromkeys(keys))


def choice_for(problem: Problem, section: Section, measured: Measured | None) -> Choice | None:
    """Return what was measured for a section. Raises TuningError for an unknown schedule.

    Weights that differ from the measured ones get no choice: those with an Inf or NaN among their
    scales, and in tiles that round weights to f16, those that must not be rounded.
    """
    if measured is None or problem.has_nonfinite_scales(section):
        return None
    key, target = key_of(problem, section), problem.target
    if problem.suits_panels(section) and problem.takes_one_term(section.products[0].operands[0]):
        of_one_term = measured(replace(key, precision="f16"))
        if of_one_term is not None and of_one_term.trial.schedule == GEMV_MATRIX:
            return of_one_term
    choice = measured(key)
    if choice is None and key.precision == "i8" and problem.suits_panels(section):
        choice = measured(replace(key, precision="f16"))  # the kernels of `f16` serve `i8` too
    if choice is None:
        return None
    schedule, known = choice.trial.schedule, schedules_for(target, key)
    if schedule not in known:
        what = f"schedule {' or '.join(known)} for {key} on {target}"
        raise TuningError(expected(what, schedule, where=choice.origin, cure=_CURE))
    rounds = schedule == TILE_HALVES and problem.may_fold
    return choice if not rounds or problem.suits_f16(section) else None


def with_choice(problem: Problem, kernel: HipKernel, choice: Choice | None) -> HipKernel:
    """Give a kernel measured constants. Raises TuningError if no candidate has these constants."""
    # the schedule differs if another section of the kernel forbids the measured one
    if choice is None or choice.trial.schedule != kernel.schedule:
        return kernel
    trial, known = choice.trial, constants_of(kernel)
    asked = dict(trial.constants)
    # stages that were measured for two terms have room for more units of one
    free = {"stage_units"} if kernel.exact_x and kernel.schedule == TILE_HALVES else set()
    # constants that q4jit did not have yet when the trial was measured keep their value by rule
    wanted = _without(known | asked, free)
    possible = candidates(problem.target, kernel, problem.m)
    for candidate in possible:
        same = _without(constants_of(candidate), free) == wanted
        if asked.keys() <= known.keys() and same:
            return replace(candidate, origin=choice.origin)
    if kernel.exact_x:  # measured for two terms, which leave other candidates
        return kernel
    what = (
        f"one of the {len(possible)} candidates for {kernel.work.name} on {problem.target} "
        f"(with the constants {', '.join(known)})"
    )
    raise TuningError(expected(what, trial.name, where=choice.origin, cure=_CURE))


def _without(constants: dict[str, Constant], names: set[str]) -> dict[str, Constant]:
    return {name: value for name, value in constants.items() if name not in names}
