"""Trace one function: once per signature, and again when a global that it reads has changed."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from q4jit import config
from q4jit.dispatch.causes import Causes
from q4jit.dispatch.kept import Kept
from q4jit.dispatch.nested import tracing
from q4jit.dispatch.options import Options
from q4jit.errors import TraceError
from q4jit.frontend.frozen import Frozen, freeze
from q4jit.frontend.graph import Graph
from q4jit.frontend.specs import Signature, classes_of
from q4jit.frontend.trace import trace
from q4jit.locks import BUILD

_MOST_RETRACED: Final = 16  # signatures that are compared when a global has changed
_MOST_TRACES: Final = 10  # of one signature, while what it reads changes


class Tracer:
    """Traces one function, and says what made it do so.

    Callers must not hold the lock BUILD, because the user's function may take locks or fork.

    Attributes:
        frozen: the values of globals and closures that the graphs contain.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        options: Options,
        parameters: Sequence[str],
        keywords: tuple[str, ...],
        kept: Kept,
    ) -> None:
        self._function, self._options, self._keywords = function, options, keywords
        self._name = getattr(function, "__name__", type(function).__name__)
        self._causes = Causes(self._name, parameters)
        self._kept = kept
        self.frozen = Frozen()

    def graph(self, signature: Signature) -> tuple[Graph, str]:
        """Return the graph of a signature, and what is new in it if it had to be traced.

        Raises TraceError, and the user's function's own errors.
        """
        known = self._kept.graphs.find(signature)
        if known is not None:
            return known, ""
        start = time.perf_counter()
        new, graph = self._settled(signature)
        cause = self._causes.of(signature)
        self._log("traced", start, cause, "" if graph is new else "; to the same graph as before")
        return graph, cause

    def _log(self, event: str, start: float, cause: str, more: str = "") -> None:
        milliseconds = 1e3 * (time.perf_counter() - start)
        config.log(f"{self._name} {event} in {milliseconds:.1f} ms, because {cause}{more}")

    def _settled(self, signature: Signature) -> tuple[Graph, Graph]:
        """Trace until globals and closures are the same before and after; keep the graph.

        Return the new graph and the kept one. Another thread may change a global meanwhile. A
        function that logs its traces changes one each time; that is no fault if the graph stays.
        Raises TraceError for a function that sets numbers, or changes what it computes with.
        """
        before = self._current(signature)
        last: tuple[object, list[str]] | None = None
        for _ in range(_MOST_TRACES):
            graph = self._trace(signature)
            after = self._freeze(signature)
            own = before.numbers_set(after)
            lost = own or before.lost(after) or before.changed(after)
            if own:
                break
            logs = (graph.statements, lost) == last and not before.numbers_changed(after)
            if logs or before.same(after):
                self._options.check(graph.outputs, graph.nodes())
                return graph, self._keep(signature, graph, before, after)
            last, before = (graph.statements, lost), after
        raise TraceError(
            f"cannot change {', '.join(lost)}, because compiled calls only compute; pass it as an "
            "argument, and return its new value"
        )

    def _keep(self, signature: Signature, graph: Graph, before: Frozen, after: Frozen) -> Graph:
        """Keep a graph with what it read, and no others that read something else.

        before, after: what it read; they differ in what the function changes itself.
        """
        with BUILD:
            stale = set(self.frozen.lost(before)).difference(before.lost(after))
            if stale:
                self._kept.forget_calls()
            if not self.frozen.same(after) or not self.frozen.unchanged():
                self.frozen = after
            return self._kept.share(signature, graph)

    def _trace(self, signature: Signature) -> Graph:
        with tracing(self._options):
            return trace(self._function, signature, self._keywords)

    def _current(self, signature: Signature) -> Frozen:
        """Return what known signatures and this read now; `frozen` itself if it still holds."""
        frozen = self.frozen
        if frozen.classes.issuperset(classes_of([signature])) and frozen and frozen.unchanged():
            return frozen
        return self._freeze(signature)

    def _freeze(self, *signatures: Signature) -> Frozen:
        """Walk to what known signatures and these read now."""
        classes = classes_of([*self._kept.graphs.entries(), *signatures])
        return freeze(self._function, classes, self.frozen.names)

    @property
    def unchanged(self) -> Callable[[], bool] | None:
        """A function that returns whether globals and closures are as traced; None without any."""
        return self.frozen.unchanged if self.frozen else None

    def renew(self) -> None:
        """Look at globals and closures again, and forget the launches if they have to be made anew.

        They stay if every signature still gives the same graph.
        """
        start, before, known = time.perf_counter(), self.frozen, self._kept.graphs.entries()
        frozen = self._freeze()
        if frozen.same(before) or not known:
            with BUILD:
                if self._is_as(before, known):
                    self.frozen = frozen
            return
        changed = before.changed(frozen)
        try:
            same = len(known) <= _MOST_RETRACED and all(
                self._trace(s).statements == graph.statements for s, graph in known.items()
            )
        except Exception:  # noqa: BLE001 - the call raises it again, when it traces
            same = False
        after = self._freeze()
        with BUILD:
            same = same and frozen.same(after) and self._is_as(before, known)
            if not same:
                self._kept.forget_calls()
            self.frozen = after
        outcome = "to the same graphs as before" if same else "calls look for other kernels"
        self._log("traced again", start, f"{', '.join(changed)} changed", f"; {outcome}")
        self._causes.globals_changed(changed)

    def _is_as(self, frozen: Frozen, known: Mapping[Signature, Graph]) -> bool:
        """Return whether no other thread has traced anything since then. Callers hold BUILD."""
        return self.frozen is frozen and self._kept.graphs.entries().keys() <= known.keys()
