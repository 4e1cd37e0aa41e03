"""Speed targets: how many times as fast as a peer or a limit q4jit should be on one machine.

They come from a file such as docs/targets.json, because they apply to the machine that they were
set on. `verdicts` compares them with runs on the CPU whose arrays are in f32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from q4jit.checked_json import COUNT, FLAG, TEXT, Rules, check_fields, one_of, read_json
from q4jit.precision import PRECISIONS
from q4jit.tools.compare.ratios import Run, Table, dtype_of, products, times_as_fast

_VERSION: Final = 1
_WHAT: Final = "a targets file such as docs/targets.json"


@dataclass(frozen=True)
class SpeedTarget:
    """The least speed of q4jit's products, relative to a peer or limit.

    Attributes:
        precision: the precision of the products.
        m: their number of rows M.
        against: the name of the peer or limit.
        least: the least ratio of speeds, by number of threads.
        cached: whether the target is for runs with the weight in the cache.
        min_size: the smallest K and N that the target applies to.
    """

    precision: str
    m: int
    against: str
    least: Mapping[int, float]
    cached: bool = False
    min_size: int = 1


def read_speed_targets(path: Path) -> tuple[SpeedTarget, ...]:
    """Return the targets of a file. Raises FormatError for any other content, and OSError."""
    data = read_json(path, _WHAT)
    check_fields(data, str(path), _FILE_RULES)
    return tuple(_target(item, f"{path}: targets[{i}]") for i, item in enumerate(data["targets"]))


def _target(data: Any, where: str) -> SpeedTarget:
    check_fields(data, where, _TARGET_RULES, _OPTIONAL_RULES)
    least = {int(threads): float(ratio) for threads, ratio in data["least"].items()}
    return SpeedTarget(**data | {"least": least})


def _are_ratios(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(name.isascii() and name.isdigit() and name[0] != "0" for name in value)
        and all(type(ratio) in {int, float} and 0 < ratio < 1e9 for ratio in value.values())
    )


_FILE_RULES: Final[Rules] = {
    "targets_version": (lambda v: type(v) is int and v == _VERSION, str(_VERSION)),
    "machine": TEXT,
    "targets": (lambda v: isinstance(v, list), "a list"),
}
_TARGET_RULES: Final[Rules] = {
    "precision": one_of(PRECISIONS),
    "m": COUNT,
    "against": TEXT,
    "least": (_are_ratios, 'ratios above 0 by number of threads, as {"1": 1.5, "2": 1.1}'),
}
_OPTIONAL_RULES: Final[Rules] = {
    "cached": FLAG,
    "min_size": COUNT,
}


def verdicts(runs: Sequence[Run], targets: Sequence[SpeedTarget]) -> Table:
    """Return a table of the targets: the measured ratio for each weight, and the verdict."""
    lines = [["precision", "M", "against", "threads", "target", "result", "verdict"]]
    for run in runs:
        threads = run["threads"]
        for target in targets:
            if target.cached != bool(run.get("cached")) or dtype_of(run) != "f32":
                continue
            ratios = [
                times_as_fast(stored, target.against)
                for stored in products(run)
                if (stored["name"], stored["m"]) == (f"q4jit {target.precision}", target.m)
                and min(stored["k"], stored["n"]) >= target.min_size
            ]
            if ratios and threads in target.least:
                least = target.least[threads]
                shown = " ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
                subject = [target.precision, str(target.m), target.against, str(threads)]
                lines.append([*subject, f"{least:.2f}", shown, _verdict(ratios, least)])
    return lines


def _verdict(ratios: Sequence[float | None], least: float) -> str:
    if any(ratio is not None and ratio < least for ratio in ratios):
        return "missed"
    return "not measured" if None in ratios else "met"
