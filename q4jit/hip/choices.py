"""Look up the schedule and constants that were measured for a product, and apply them."""

from dataclasses import replace

from q4jit.errors import TuningError
from q4jit.hip.candidates import candidates, constants_of, schedules_for
from q4jit.hip.kernel import TILE_HALVES, HipKernel, HipPlan
from q4jit.hip.problem import Problem
from q4jit.hip.tunings import Choice, Key, Tuned
from q4jit.plan.kernels import Section
from q4jit.plan.options import PlanOptions


def key_of(problem: Problem, section: Section) -> Key:
    """Return the key of the measured constants for the products of a section."""
    k = section.products[0].operands[0].width
    formats = "+".join(weight.format for weight in problem.weights(section))
    return Key(k, section.width, formats, problem.m_class, problem.plan_options.precision)


def keys_of(plan: HipPlan, m: int, plan_options: PlanOptions) -> tuple[Key, ...]:
    """Return the keys of all products of a plan, each once."""
    keys = [
        key_of(Problem(plan.graph, plan.target, 1 if work.uniform else m, plan_options), section)
        for work in (kernel.work for kernel in plan.kernels)
        for section in work.sections
    ]
    return tuple(dict.fromkeys(keys))


def choice_for(problem: Problem, section: Section, tuned: Tuned | None) -> Choice | None:
    """Return what was measured for a section. Raises TuningError for an unknown schedule."""
    if tuned is None or problem.has_endless_scales(section):  # measured are finite ones
        return None
    key, target = key_of(problem, section), problem.target
    choice = tuned(key)
    if choice is None:
        return None
    schedule, accepted = choice.trial.schedule, schedules_for(target, key)
    if schedule not in accepted:
        raise TuningError(
            f"{choice.origin}: found the schedule {schedule} for {key} on {target}, accepted are "
            f"{', '.join(accepted)}; q4jit tune measures again"
        )
    rounds = schedule == TILE_HALVES and problem.may_fold  # such weights were measured
    return choice if not rounds or problem.suits_f16(section) else None


def as_chosen(problem: Problem, kernel: HipKernel, choice: Choice | None) -> HipKernel:
    """Give a kernel measured constants. Raises TuningError if no candidate has these constants."""
    if choice is None or choice.trial.schedule != kernel.schedule:  # another section forbids it
        return kernel
    trial, known = choice.trial, constants_of(kernel)
    asked = dict(trial.constants)
    # a constant that is younger than the choice keeps its value by rule
    wanted = known | asked
    legal = candidates(problem.target, kernel, problem.m)
    for candidate in legal:
        if asked.keys() <= known.keys() and constants_of(candidate) == wanted:
            return replace(candidate, origin=f"tuned: {choice.origin}")
    raise TuningError(
        f"{choice.origin}: found {trial.name} for {kernel.work.name} on {problem.target}, "
        f"accepted are {', '.join(known)} of one of the {len(legal)} candidates that q4jit tune "
        "tries; it measures them again and replaces the entry"
    )
