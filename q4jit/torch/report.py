"""What `replace_linears` has replaced, and what it has skipped and why."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """A module that was replaced.

    Attributes:
        format: of the quantised weight.
        K, N: its size.
        bytes_before, bytes_after: of the weight.
        shares: the name of a module above it that has the same weight, or "".
    """

    name: str
    format: str
    K: int
    N: int
    bytes_before: int
    bytes_after: int
    shares: str = ""


@dataclass(frozen=True)
class Skipped:
    """A module that was left as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `replace_linears` did. It prints as a table."""

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of the replaced weights; those that modules shared are counted once."""
        return sum(entry.bytes_before for entry in self.replaced if not entry.shares)

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantised weights; those that modules share are counted once."""
        return sum(entry.bytes_after for entry in self.replaced if not entry.shares)

    def __str__(self) -> str:
        rows = [("module", "format", "K", "N", "before", "after")]
        for entry in self.replaced:
            sizes = _size(entry.bytes_before), _size(entry.bytes_after)
            if entry.shares:
                sizes = f"the weight of {entry.shares}", ""
            rows.append((entry.name, entry.format, str(entry.K), str(entry.N), *sizes))
        total = _size(self.bytes_before), _size(self.bytes_after)
        rows.append((f"{len(self.replaced)} replaced", "", "", "", *total))
        lines = aligned(rows)
        if self.skipped:
            skipped = ((f"skipped {entry.name}", entry.reason) for entry in self.skipped)
            lines += ["", *aligned(skipped)]
        return "\n".join(lines)


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _size(size: int) -> str:
    return f"{size / (1 << 20):.2f} MiB"
