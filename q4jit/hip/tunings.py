"""Constants of kernels that were chosen by measurement: the user's file, and one shipped per arch.

What was tried for a product is kept, the rejected candidates too, so that a later search measures
only what is new. A file may come from elsewhere (`q4jit tune --merge`): every field is checked, and
the constants are names and numbers here; the schedule that applies them accepts only those that it
would have tried itself.
"""

import contextlib
import datetime
import functools
import importlib.resources
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from q4jit import config
from q4jit.checked_json import ANYTHING, Rules, check_fields, shown
from q4jit.compilers.cache import write_atomically
from q4jit.errors import CacheWarning, TuningError
from q4jit.locks import BUILD
from q4jit.precision import PRECISIONS
from q4jit.targets import HIP_ARCHS
from q4jit.weights.formats import FORMATS

FILE_NAME: Final = "tunings.json"
VERSION: Final = 1
_HEADER: Final = "q4jit_tunings"
_MOST_SIZE: Final = (1 << 31) - 1
_MOST_NUMBER: Final = 1e15
_MOST_CONSTANT: Final = 1 << 20
_MOST_BYTES: Final = 64 << 20  # of a file: some hundred thousand trials
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_HASH: Final = re.compile(r"[0-9a-f]{16}")

Constant = int | str
Constants = tuple[tuple[str, Constant], ...]


@dataclass(frozen=True, order=True)
class Key:
    """The products that a choice serves.

    k, n: shape of each weight. format: of the weights that share x and columns, joined by `+`.
    m: the class of the number of rows. precision: what was asked for.
    """

    k: int
    n: int
    format: str
    m: int
    precision: str

    def __str__(self) -> str:
        return f"{self.format} [{self.k}, {self.n}], M class {self.m}, {self.precision}"


@dataclass(frozen=True, order=True)
class Machine:
    """Where times were taken: a device's name and arch, and the compiler's fingerprint."""

    device: str
    arch: str
    compiler: str


@dataclass(frozen=True)
class Trial:
    """One candidate: its schedule and constants, and what became of it.

    text: the begin of a hash of the kernels' text. us: microseconds of a call, None where it was
    rejected, and `rejected` says why. error: as the contract measures it, None where it was not
    run. date: when, ISO 8601, UTC.
    """

    schedule: str
    constants: Constants
    text: str
    us: float | None
    error: float | None
    rejected: str
    date: str

    @property
    def name(self) -> str:
        """The candidate in words."""
        return " ".join([self.schedule, *(f"{name}={value}" for name, value in self.constants)])


@dataclass(frozen=True)
class Choice:
    """A trial that won, and the file and date that say so."""

    trial: Trial
    origin: str


Tuned = Callable[[Key], Choice | None]
"""What a plan asks for the constants of a product; None leaves them to the schedule."""

Tunings = dict[tuple[Machine, Key], tuple[Trial, ...]]


def best(trials: tuple[Trial, ...]) -> Trial | None:
    """The fastest trial; None where all were rejected."""
    timed = [(trial.us, i) for i, trial in enumerate(trials) if trial.us is not None]
    return trials[min(timed)[1]] if timed else None


def today() -> str:
    """Now, as a trial is dated."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# --- looking up -----------------------------------------------------------------------------------


def find(arch: str, machine: Machine | None = None) -> Tuned:
    """What was measured on this very machine, else what is shipped for the arch."""

    def tuned(key: Key) -> Choice | None:
        if machine is not None:
            trial = best(stored().get((machine, key), ()))
            if trial is not None:
                return Choice(trial, f"{path() or 'this process'}, {trial.date}")
        return shipped_choice(arch, machine, key)

    return tuned


def shipped_choice(arch: str, machine: Machine | None, key: Key) -> Choice | None:
    """The default of an arch; where several devices or compilers gave one, the most alike's."""
    found = []
    for (other, its_key), trials in shipped(arch).items():
        trial = best(trials)
        if its_key == key and trial is not None:
            alike = machine is not None and (
                2 * (other.device == machine.device) + (other.compiler == machine.compiler)
            )
            found.append((int(alike), other, trial))
    if not found:
        return None
    _, other, trial = max(found, key=lambda each: each[:2])
    return Choice(trial, f"defaults of q4jit, measured on {other.device}, {trial.date}")


@functools.cache
def shipped(arch: str) -> Tunings:
    """The defaults that q4jit comes with. Raises TuningError for a damaged installation."""
    file = importlib.resources.files("q4jit.hip") / "tuned" / f"{arch}.json"
    if not file.is_file():
        return {}
    found = parse(file.read_text(encoding="utf-8"), str(file))
    foreign = sorted({machine.arch for machine, _ in found} - {arch})
    if foreign:
        raise TuningError(f"{file}: found times of {', '.join(foreign)}, accepted are {arch}'s")
    return found


# --- the user's file ------------------------------------------------------------------------------

_kept: Tunings = {}  # what this process measured where no file can be written
_read: dict[Path, tuple[tuple[int, int, int], Tunings]] = {}


def path() -> Path | None:
    """The user's file, beside the compiled kernels; None where there is no such directory."""
    directory = config.cache_dir()
    return directory / FILE_NAME if directory is not None else None


def stored() -> Tunings:
    """What this user measured; a damaged file costs a warning and counts as empty."""
    file = path()
    if file is None:
        return dict(_kept)
    with BUILD:
        try:
            status = file.stat()
        except FileNotFoundError:
            return dict(_kept)
        except OSError as error:
            _warn(file, f"cannot be read ({error})")
            return dict(_kept)
        state = status.st_mtime_ns, status.st_size, status.st_ino
        if _read.get(file, (None,))[0] != state:
            try:
                found = load(file)
            except (TuningError, OSError) as error:
                _warn(file, f"is not used: {error}")
                found = {}
            _read[file] = state, found  # also an empty one: one warning for a damaged file
        return _read[file][1] | _kept


def keep(machine: Machine, key: Key, trials: tuple[Trial, ...]) -> None:
    """Put trials in the place of all that is known of a product on a machine."""
    with BUILD:
        if not _update(lambda known: known | {(machine, key): trials}):
            _kept[machine, key] = trials


def merge_file(source: Path) -> Tunings:
    """Add the trials of another file to the user's, and return them; see `merged`.

    Raises TuningError for what is no file of tunings, and where there is no directory to keep it.
    """
    more = load(source)
    with BUILD:
        if not _update(lambda known: merged(known, more)):
            raise TuningError(f"{source}: no file to add it to: Q4JIT_CACHE_DIR names a directory")
    return more


def merged(known: Tunings, more: Tunings) -> Tunings:
    """Both; of the trials of one candidate, the one of the later date."""
    found = dict(known)
    for place, trials in more.items():
        by_candidate = {(t.schedule, t.constants): t for t in found.get(place, ())}
        for trial in trials:
            candidate = trial.schedule, trial.constants
            if candidate not in by_candidate or by_candidate[candidate].date <= trial.date:
                by_candidate[candidate] = trial
        found[place] = tuple(by_candidate.values())
    return found


def _update(change: Callable[[Tunings], Tunings]) -> bool:
    """Change the user's file; whether it could be written."""
    file = path()
    if file is None:
        return False
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(file):
            write_atomically(file, to_text(change(_known(file))).encode())
    except OSError as error:
        _warn(file, f"cannot be written ({error})")
        return False
    return True


def _known(file: Path) -> Tunings:
    """What is in the file; a damaged one is moved aside rather than overwritten."""
    try:
        return load(file)
    except FileNotFoundError:
        return {}
    except TuningError as error:
        aside = file.with_suffix(".damaged")
        file.replace(aside)
        _warn(file, f"was damaged and is {aside.name} now: {error}")
        return {}


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """No other process changes the file meanwhile; the lock ends with the process, too."""
    import fcntl  # only a search writes tunings, and other systems than Linux may lack it

    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _warn(file: Path, problem: str) -> None:
    warnings.warn(f"the tunings {file} {problem}", CacheWarning, stacklevel=3)


# --- files ----------------------------------------------------------------------------------------


def to_text(tunings: Tunings) -> str:
    """JSON that `parse` reads; in one order, the fastest trial first."""
    entries = []
    for (machine, key), trials in sorted(tunings.items()):
        ordered = sorted(trials, key=lambda t: (t.us is None, t.us or 0.0, t.name))
        told = [asdict(t) | {"constants": dict(t.constants)} for t in ordered]
        entries.append({**asdict(machine), **asdict(key), "trials": told})
    return json.dumps({_HEADER: VERSION, "tunings": entries}, indent=1, allow_nan=False) + "\n"


def load(file: Path) -> Tunings:
    """The tunings of a file. Raises TuningError for any other content, and OSError."""
    size = file.stat().st_size
    if size > _MOST_BYTES:
        raise TuningError(f"{file}: found {size:,} bytes, accepted are {_MOST_BYTES:,}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TuningError(f"{file}: found bytes that are no UTF-8 ({error})") from None
    return parse(text, str(file))


def parse(text: str, where: str) -> Tunings:
    """Tunings from JSON; `where` begins the messages. Raises TuningError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TuningError(f"{where}: found no JSON ({error}), accepted is {_EXPORTED}") from None
    check_fields(data, where, {_HEADER: ANYTHING, "tunings": ANYTHING}, error=TuningError)
    if type(data[_HEADER]) is not int or data[_HEADER] != VERSION:
        raise TuningError(f"{where}: found {_HEADER} {shown(data[_HEADER])}, accepted is 1")
    found: Tunings = {}
    for i, entry in enumerate(_list(data["tunings"], f"{where}: tunings")):
        place = f"{where}: tunings[{i}]"
        machine, key, trials = _entry(entry, place)
        if (machine, key) in found:
            raise TuningError(f"{place}: found a second entry for {key} on {machine.device}")
        found[machine, key] = trials
    return found


_EXPORTED: Final = "what q4jit tune --export writes"
_RENAMED: Final = {"groups": "wave_panels"}  # files of q4jit 0.1 use the older name


def _entry(data: Any, where: str) -> tuple[Machine, Key, tuple[Trial, ...]]:
    rules = _MACHINE_RULES | _KEY_RULES | {"trials": ANYTHING}
    check_fields(data, where, rules, error=TuningError)
    machine = Machine(**{name: data[name] for name in _names(Machine)})
    key = Key(**{name: data[name] for name in _names(Key)})
    trials = [
        _trial(each, f"{where}.trials[{i}]")
        for i, each in enumerate(_list(data["trials"], f"{where}.trials"))
    ]
    if len({(trial.schedule, trial.constants) for trial in trials}) < len(trials):
        raise TuningError(f"{where}: found one candidate twice, accepted is one trial of each")
    return machine, key, tuple(trials)


def _trial(data: Any, where: str) -> Trial:
    check_fields(data, where, _TRIAL_RULES, error=TuningError)
    if (data["us"] is None) != bool(data["rejected"]):
        raise TuningError(f"{where}: accepted is one of us and rejected, found both or none")
    constants = {_RENAMED.get(name, name): value for name, value in data["constants"].items()}
    return Trial(**data | {"constants": tuple(sorted(constants.items()))})


def _names(kind: type[Machine | Key | Trial]) -> set[str]:
    return {each.name for each in fields(kind)}


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise TuningError(f"{where}: found {shown(data)}, accepted is a list")
    return data


def _is_text(most: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v.isprintable() and 0 < len(v) <= most


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST_SIZE


def _is_formats(value: Any) -> bool:
    return isinstance(value, str) and all(name in FORMATS for name in value.split("+"))


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and 0 <= value < _MOST_NUMBER  # no NaN, no Inf


def _are_constants(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _NAME.fullmatch(name)
        and (
            (type(v) is int and 0 <= v <= _MOST_CONSTANT)
            or (isinstance(v, str) and _NAME.fullmatch(v) is not None)
        )
        for name, v in value.items()
    )


def _is_date(value: Any) -> bool:
    try:
        date = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    # dates are compared as texts: one spelling
    return date.tzinfo is datetime.UTC and date.isoformat(timespec="seconds") == value


_MACHINE_RULES: Final[Rules] = {
    "device": (_is_text(200), "a device's name"),
    "arch": (lambda v: isinstance(v, str) and v in HIP_ARCHS, f"one of {', '.join(HIP_ARCHS)}"),
    "compiler": (_is_text(4000), "a compiler's version and flags"),
}
_KEY_RULES: Final[Rules] = {
    "k": (_is_size, "a whole number from 1"),
    "n": (_is_size, "a whole number from 1"),
    "format": (_is_formats, f"formats joined by +, of {', '.join(FORMATS)}"),
    "m": (_is_size, "a whole number from 1"),
    "precision": (
        lambda v: isinstance(v, str) and v in PRECISIONS,
        f"one of {', '.join(PRECISIONS)}",
    ),
}
_TRIAL_RULES: Final[Rules] = {
    "schedule": (lambda v: isinstance(v, str) and bool(_NAME.fullmatch(v)), "a schedule's name"),
    "constants": (_are_constants, "names with whole numbers or names"),
    "text": (lambda v: isinstance(v, str) and bool(_HASH.fullmatch(v)), "16 hexadecimal digits"),
    "us": (lambda v: v is None or (_is_number(v) and v > 0), "microseconds, or null"),
    "error": (lambda v: v is None or _is_number(v), "a number from 0, or null"),
    "rejected": (lambda v: v == "" or _is_text(4000)(v), "a reason, or an empty text"),
    "date": (_is_date, "a date as 2026-01-31T12:00:00+00:00"),
}
