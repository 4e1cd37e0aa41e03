"""Reports on a decorated function: counts of calls, sources of kernels, explanations."""

from dataclasses import dataclass

from q4jit.dispatch.specializer import Specializer, assembly, counted
from q4jit.errors import ArgumentError
from q4jit.frontend.specs import Signature
from q4jit.pipeline import Remark
from q4jit.plan.kernels import Source
from q4jit.runtime.pool import threads_in_use


@dataclass(frozen=True)
class Stats:
    """Counts of calls and compilations since the function was decorated.

    Attributes:
        hits: calls with shapes that were known.
        misses: calls with new shapes. Each binds kernels to the shapes, and compiles them if there
            are none yet.
        compiles: kernels that a compiler made. The other kernels came from the disk cache.
        seconds: time spent on specialising, in seconds: planning, compiling, loading.
    """

    hits: int = 0
    misses: int = 0
    compiles: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{counted(self.hits, 'hit')}, {counted(self.misses, 'miss', 'es')}, "
            f"{counted(self.compiles, 'kernel')} compiled, {self.seconds:.2f} s"
        )


class Inspected:
    """The part of a decorated function that shows what it has compiled."""

    _name: str
    _disabled: bool
    _hits: int
    _misses: int
    _specializer: Specializer

    @property
    def stats(self) -> Stats:
        """Hits, misses, compilations, and the seconds spent on them."""
        made = self._specializer
        return Stats(self._hits, self._misses, made.compiles, made.seconds)

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signatures that were traced so far, oldest first."""
        return self._specializer.signatures

    def inspect_source(self, target: str | None = None) -> str:
        """Return the generated source of all kernels so far: LLVM IR, or HIP.

        Each kernel's text starts with a comment that describes it. Oldest signatures come first.
        target: write the same kernels for this target, such as "hip:gfx1100" or "cpu:aarch64"; this
        machine need not have it. None: the target that the calls used.

        Raises ArgumentError before the first call or `warmup`, and TargetError for an unknown
        target.
        """
        return "\n".join(source.text for source in self._sources(target))

    def inspect_asm(self, target: str | None = None) -> str:
        """Return the assembly of all kernels so far; target: as in `inspect_source`.

        Raises CompileError, and the errors of `inspect_source`.
        """
        return "\n".join(assembly(source) for source in self._sources(target))

    def _sources(self, target: str | None) -> list[Source]:
        if self._disabled:
            raise ArgumentError(
                f"{self._name} has no kernels: Q4JIT_DISABLE_JIT was set when it was decorated; "
                "unset it and start again"
            )
        sources = self._specializer.sources(target)
        if not sources:
            raise ArgumentError(
                f"{self._name} has no signature yet; call it once, or call warmup(...) with "
                "arguments like those of a call"
            )
        return sources

    def explain(self) -> str:
        """Return a report, as text to print, on what was compiled and why.

        The first line has the counts of `stats`, the second the CPU's threads. Then, for each set
        of kernels: the plan, where calls ran and why, options that the kernels do not follow, the
        origin of the kernels' constants, and whether each was compiled or read from disk.
        """
        lines = [f"{self._name}: {self.stats}"]
        threads = counted(threads_in_use(), "thread")
        if self._disabled:
            return "\n".join([*lines, "Q4JIT_DISABLE_JIT is set: calls run py_func in NumPy"])
        compiled = self._specializer.explain()
        nothing = ["nothing is compiled yet: the first call or warmup(...) does that"]
        return "\n".join([*lines, f"kernels on the CPU use {threads}", *(compiled or nothing)])

    @property
    def remarks(self) -> list[Remark]:
        """The lines of `explain` about precision, block size and constants, as values."""
        return self._specializer.remarks()
