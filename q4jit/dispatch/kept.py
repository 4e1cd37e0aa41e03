"""What one function keeps between its calls: graphs, plans, kernels and launches.

Signatures whose graphs compute the same share everything that is made of them, so a new int that
the kernels' text does not depend on costs a trace. What was not used for long is forgotten, so that
values without end need memory with an end; the next call that needs it makes it again.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from q4jit.arrays.specs import shape_key
from q4jit.frontend.graph import Graph
from q4jit.frontend.specs import ScalarSpec, Signature, StaticSpec
from q4jit.pipeline import Backend, DeviceLaunch, Launch, ReadyKernel
from q4jit.plan.kernels import Plan
from q4jit.runtime.driver import Device
from q4jit.targets import Target

MOST_CALLS: Final = 4096
"""Sets of exact arguments whose launch is found at once. Each takes about 1 KiB."""

MOST_PLANS: Final = 256
"""Plans with their kernels. Each takes about 100 KiB on a CPU."""

_MOST_RULES: Final = 8  # that `explain` lists for a plan

PlanKey = tuple[Graph, Target, int]  # and the class of M
Key = tuple[PlanKey, Device | None]

_K = TypeVar("_K")
_V = TypeVar("_V")


class Recent(Generic[_K, _V]):
    """Entries of two generations. A new one is young, and so is an old one that is asked for.

    `age` forgets the old ones, and the young become old. So an entry stays for as long as it is
    asked for between one `age` and the next. The methods take no lock: two threads may lose an
    entry to each other, and make it again.
    """

    def __init__(self) -> None:
        self.young: dict[_K, _V] = {}
        self._old: dict[_K, _V] = {}

    def find(self, key: _K) -> _V | None:
        """Return the entry of a key, which is young from now on; None for an unknown key."""
        value = self.young.get(key)
        if value is None and (value := self._old.get(key)) is not None:
            self.young[key] = value
        return value

    def age(self) -> None:
        """Forget the entries that were not asked for since the last time."""
        self._old = dict(self.young)
        self.young.clear()

    def clear(self) -> None:
        """Forget all entries."""
        self._old = {}
        self.young.clear()

    def entries(self) -> dict[_K, _V]:
        """Return a copy of all entries, oldest first."""
        return {**self._old, **self.young}


@dataclass(frozen=True)
class Compiled:
    """The kernels of one graph and class of M, loaded on one device or on the CPU.

    Attributes:
        launches: the kernels bound to exact shapes, by `shapes_key`.
        rules: the policy's rule that chose the place, for the latest numbers of rows.
    """

    plan: Plan[Any]
    backend: Backend
    kernels: tuple[ReadyKernel, ...]
    launches: dict[tuple[object, ...], Launch] = field(default_factory=dict)
    rules: dict[int, str] = field(default_factory=dict)

    def note_rule(self, rows: int, rule: str) -> None:
        """Remember the rule that chose the place of a call, for `explain`."""
        self.rules.pop(rows, None)
        self.rules[rows] = rule
        if len(self.rules) > _MOST_RULES:
            del self.rules[next(iter(self.rules))]


class Kept:
    """What one function keeps. Writers hold the lock BUILD, but for `share` and `graphs.find`.

    Attributes:
        launches: launches by the key of a call's arguments.
        on_tensors: launches on PyTorch's tensors, by `tensor_facts`.
        graphs: the graph of each signature. Several signatures may have the same.
        plans: each plan, with the M of its first call.
        compiled: kernels and launches.
        kernels: the kernels in memory, by text.
    """

    def __init__(self) -> None:
        self.launches: dict[tuple[object, ...], Launch] = {}
        self.on_tensors: dict[tuple[object, ...], DeviceLaunch] = {}
        self.graphs: Recent[Signature, Graph] = Recent()
        self.plans: dict[PlanKey, tuple[Plan[Any], int]] = {}
        self.compiled: dict[Key, Compiled] = {}
        self.kernels: weakref.WeakValueDictionary[tuple[str, Device | None], ReadyKernel] = (
            weakref.WeakValueDictionary()
        )
        self._texts: weakref.WeakValueDictionary[object, Graph] = weakref.WeakValueDictionary()
        self._young_plans = 0  # made since the last `trim` that forgot something

    def share(self, signature: Signature, graph: Graph) -> Graph:
        """Return a known graph that computes the same as a new one, or the new one.

        It is that of `signature` from now on. Another thread may have been faster.
        """
        open_ = tuple(_without_values(spec) for spec in signature)
        graph = self._texts.setdefault((open_, graph.statements), graph)
        return self.graphs.young.setdefault(signature, graph)

    def add_plan(self, key: PlanKey, plan: Plan[Any], rows: int) -> None:
        """Keep a plan; rows: of the call that it was made for."""
        self._young_plans += key not in self.plans
        self.plans[key] = plan, rows

    def add_on_tensors(self, facts: tuple[object, ...], launch: DeviceLaunch) -> None:
        """Keep the launch of a call on PyTorch's tensors. It takes no lock."""
        if len(self.on_tensors) >= MOST_CALLS:  # calls that differ only in `out`
            self.on_tensors.clear()
        self.on_tensors[facts] = launch

    def trim(self) -> None:
        """Forget what was not used for long, if there is too much."""
        calls = max(len(self.launches), len(self.graphs.young))
        if calls < MOST_CALLS and self._young_plans < MOST_PLANS:
            return
        self._young_plans = 0
        self.launches.clear()
        self.on_tensors.clear()
        self.graphs.age()
        used = set(self.graphs.entries().values())
        for plan_key in [key for key in self.plans if key[0] not in used]:
            del self.plans[plan_key]
        for key, compiled in list(self.compiled.items()):
            compiled.launches.clear()
            if compiled.plan.graph not in used:
                del self.compiled[key]

    def forget_calls(self) -> None:
        """Forget what each call would run. Plans and kernels stay, for graphs of the same text."""
        self.launches.clear()
        self.on_tensors.clear()
        self.graphs.clear()

    def signatures(self) -> tuple[Signature, ...]:
        """Return the signatures in use, oldest first. Types of numbers make no other signature."""
        first: dict[object, Signature] = {}
        for signature, graph in self.graphs.entries().items():
            numbers = tuple(ScalarSpec() if isinstance(s, ScalarSpec) else s for s in signature)
            first.setdefault((numbers, graph), signature)
        return tuple(first.values())

    def plans_in_use(self) -> list[tuple[Plan[Any], int]]:
        """Return the plans of the current signatures, each with the M of its first call."""
        used = set(self.graphs.entries().values())
        return [plan for key, plan in list(self.plans.items()) if key[0] in used]

    def compiled_in_use(self) -> list[Compiled]:
        """Return the kernels of the current signatures."""
        used = set(self.graphs.entries().values())
        return [made for made in list(self.compiled.values()) if made.plan.graph in used]


def shapes_key(signature: Signature, args: Sequence[Any]) -> tuple[object, ...]:
    """Return what a launch depends on, given its kernels: all arguments but the static ones."""
    pairs = zip(signature, args, strict=True)
    return tuple(None if isinstance(spec, StaticSpec) else shape_key(v) for spec, v in pairs)


def _without_values(spec: object) -> object:
    """Return a spec without what the text of a graph shows, if it matters: values and types."""
    if isinstance(spec, StaticSpec | ScalarSpec):
        return type(spec)
    return spec
