"""Trace one function: once per signature, and again when a global that it reads has changed."""

import time
from collections.abc import Callable, Sequence
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
        new = self._trace(signature)
        self._options.check(new.outputs, new.nodes())
        graph, cause = self._kept.share(signature, new), self._causes.of(signature)
        self._log("traced", start, cause, "" if graph is new else "; to the same graph as before")
        return graph, cause

    def _log(self, event: str, start: float, cause: str, more: str = "") -> None:
        milliseconds = 1e3 * (time.perf_counter() - start)
        config.log(f"{self._name} {event} in {milliseconds:.1f} ms, because {cause}{more}")

    def _trace(self, signature: Signature) -> Graph:
        """Trace the function and note what it reads of globals and closures.

        Raises TraceError if it changes a number among them, which compiled calls would not do.
        """
        before = self._freeze(signature)
        with tracing(self._options):
            graph = trace(self._function, signature, self._keywords)
        self.frozen = self._freeze(signature)
        changed = before.numbers_changed(self.frozen)
        if changed:
            raise TraceError(
                f"cannot change {', '.join(changed)}, because compiled calls only compute; pass it "
                "as an argument, and return its new value"
            )
        return graph

    def _freeze(self, *signatures: Signature) -> Frozen:
        """Return what known signatures and these read now."""
        return freeze(self._function, classes_of([*self._kept.graphs.entries(), *signatures]))

    @property
    def unchanged(self) -> Callable[[], bool] | None:
        """A function that returns whether globals and closures are as traced; None without any."""
        return self.frozen.unchanged if self.frozen else None

    def renew(self) -> None:
        """Look at globals and closures again, and forget the launches if they have to be made anew.

        They stay if every signature still gives the same graph.
        """
        frozen, before = self._freeze(), self.frozen
        known = self._kept.graphs.entries()
        if frozen.same(before) or not known:
            self.frozen = frozen
            return
        start, changed = time.perf_counter(), before.changed(frozen)
        try:
            same = len(known) <= _MOST_RETRACED and all(
                self._trace(s).statements == graph.statements for s, graph in known.items()
            )
        except Exception:  # noqa: BLE001 - the call raises it again, when it traces
            same = False
        self.frozen = frozen
        if not same:
            with BUILD:
                self._kept.forget_calls()
        outcome = "to the same graphs as before" if same else "calls look for other kernels"
        self._log("traced again", start, f"{', '.join(changed)} changed", f"; {outcome}")
        self._causes.globals_changed(changed)
