"""What `fuse` has fused, and what it has left as it was and why."""

from dataclasses import dataclass

from q4jit.torch.report import Skipped, aligned


@dataclass(frozen=True)
class FusedHalves:
    """A decoder layer that was fused.

    Attributes:
        attention: whether norm, q, k, v and o are.
        feed_forward: whether norm, gate, up and down are.
    """

    name: str
    attention: bool
    feed_forward: bool


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did. It prints as a table, with equal layers in one line."""

    fused: tuple[FusedHalves, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layers", "attention", "feed-forward")]
        runs: list[list[FusedHalves]] = []
        for entry in self.fused:
            same = runs and _halves(runs[-1][0]) == _halves(entry)
            if same:
                runs[-1].append(entry)
            else:
                runs.append([entry])
        for run in runs:
            first, last = run[0].name, run[-1].name
            names = first if len(run) == 1 else f"{first} to {last}"
            halves = ("fused" if half else "as it was" for half in _halves(run[0]))
            rows.append((names, *halves))
        rows.append((f"{len(self.fused)} fused", "", ""))
        lines = aligned(rows)
        if self.skipped:
            skipped = ((f"skipped {entry.name}", entry.reason) for entry in self.skipped)
            lines += ["", *aligned(skipped)]
        return "\n".join(lines)


def _halves(entry: FusedHalves) -> tuple[bool, bool]:
    return entry.attention, entry.feed_forward
