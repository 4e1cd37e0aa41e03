"""Tunings: files of measured constants. The user has one, and q4jit ships one per arch.

A file keeps every trial, also of rejected candidates, so that a later search measures only new
candidates. A file may come from another machine (`q4jit tune --merge`), so every field is checked.
Constants are only names and numbers here; `choices` applies only those of a candidate.
"""

import contextlib
import datetime
import functools
import importlib.resources
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from q4jit import config
from q4jit.checked_json import ANYTHING, Rules, check_fields, shown
from q4jit.errors import CacheWarning, TuningError, expected
from q4jit.files import (
    UnsuitableError,
    make_private,
    read_regular,
    write_atomically,
)
from q4jit.locks import BUILD, warn, warnings_later
from q4jit.precision import PRECISIONS
from q4jit.targets import HIP_ARCHS
from q4jit.weights.formats import FORMATS

FILE_NAME: Final = "tunings.json"
VERSION: Final = 1
_HEADER: Final = "q4jit_tunings"
_MOST_SIZE: Final = (1 << 31) - 1
_MOST_NUMBER: Final = 1e15
_MOST_CONSTANT: Final = 1 << 20
_MOST_BYTES: Final = 64 << 20  # of a file: more than a hundred thousand trials
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_HASH: Final = re.compile(r"[0-9a-f]{16}")

Constant = int | str
Constants = tuple[tuple[str, Constant], ...]
Identity = tuple[str, Constants]
"""A candidate's schedule and constants."""


@dataclass(frozen=True, order=True)
class Key:
    """The products that a choice serves: all that have these properties.

    Attributes:
        k: K, the elements of a column of each weight.
        n: columns of each weight.
        format: the formats of the weights that share x and columns, joined by `+`.
        m: the class of M.
        precision: the precision that the caller asked for.
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
    """The machine of a measurement.

    Attributes:
        device: the device's name.
        arch: the device's arch.
        compiler: the compiler's fingerprint.
    """

    device: str
    arch: str
    compiler: str


@dataclass(frozen=True)
class Trial:
    """A candidate and what a search measured for it.

    Attributes:
        schedule: the schedule.
        constants: the constants, sorted by name.
        text: the first 16 digits of a hash of the kernels' text.
        us: microseconds of a call; None if the candidate was rejected.
        error: the numerical error as in `precision.relative_error`; None if it did not run.
        rejected: why the candidate was rejected; empty if it was not.
        date: the date and time of the measurement, ISO 8601 in UTC.
    """

    schedule: str
    constants: Constants
    text: str
    us: float | None
    error: float | None
    rejected: str
    date: str

    @property
    def identity(self) -> Identity:
        """Return what distinguishes the candidate from the others of its product."""
        return self.schedule, self.constants

    @property
    def name(self) -> str:
        """Return the candidate as text: `gemv block_size=64 …`."""
        return " ".join([self.schedule, *(f"{name}={value}" for name, value in self.constants)])


@dataclass(frozen=True)
class Choice:
    """The fastest trial of a product; origin: the file and the date, for messages."""

    trial: Trial
    origin: str


Measured = Callable[[Key], Choice | None]
"""Looks up what was measured for a product; None if nothing was."""

Tunings = dict[tuple[Machine, Key], tuple[Trial, ...]]


def best(trials: tuple[Trial, ...]) -> Trial | None:
    """Return the fastest trial; None if all were rejected."""
    timed = [(trial.us, i) for i, trial in enumerate(trials) if trial.us is not None]
    return trials[min(timed)[1]] if timed else None


def today() -> str:
    """Return the date and time for a trial."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# --- looking up -----------------------------------------------------------------------------------


def find(arch: str, machine: Machine | None = None) -> Measured:
    """Return a function that looks up the choice for a product.

    It takes what was measured on this machine, and otherwise the default that q4jit ships.
    """

    def measured(key: Key) -> Choice | None:
        if machine is not None:
            trial = best(stored().get((machine, key), ()))
            if trial is not None:
                return Choice(trial, f"{path() or 'this process'}, {trial.date}")
        return shipped_choice(arch, machine, key)

    return measured


def shipped_choice(arch: str, machine: Machine | None, key: Key) -> Choice | None:
    """Return the default for a product; of several, that of the most similar machine."""
    choices = []
    for (other, its_key), trials in shipped(arch).items():
        trial = best(trials)
        if its_key == key and trial is not None:
            similarity = machine is not None and (
                2 * (other.device == machine.device) + (other.compiler == machine.compiler)
            )
            choices.append((int(similarity), other, trial))
    if not choices:
        return None
    _, other, trial = max(choices, key=lambda each: each[:2])
    return Choice(trial, f"defaults of q4jit, measured on {other.device}, {trial.date}")


@functools.cache
def shipped(arch: str) -> Tunings:
    """Return the defaults that q4jit ships. Raises TuningError if the installation is damaged."""
    file = importlib.resources.files("q4jit.hip") / "tuned" / f"{arch}.json"
    if not file.is_file():
        return {}
    defaults = parse(file.read_text(encoding="utf-8"), str(file))
    foreign = sorted({machine.arch for machine, _ in defaults} - {arch})
    if foreign:
        got = f"measurements on {', '.join(foreign)}"
        raise TuningError(expected(f"measurements on {arch}", got, where=str(file)))
    return defaults


# --- the user's file ------------------------------------------------------------------------------

_kept: Tunings = {}  # trials of this process that could not be written to a file
_read: dict[Path, tuple[tuple[int, int, int], Tunings]] = {}


def path() -> Path | None:
    """Return the path of the user's file, in the cache directory, if there is one."""
    directory = config.cache_dir()
    return directory / FILE_NAME if directory is not None else None


def stored() -> Tunings:
    """Return the user's tunings. A damaged file counts as empty, with a warning."""
    file = path()
    if file is None:
        return dict(_kept)
    with warnings_later(), BUILD:
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
                tunings = load(file)
            except (TuningError, OSError) as error:
                _warn(file, f"is ignored: {error}")
                tunings = {}
            _read[file] = state, tunings  # also for a damaged file, which then warns only once
        return _read[file][1] | _kept


def keep(machine: Machine, key: Key, trials: tuple[Trial, ...]) -> None:
    """Replace all trials of a product on a machine."""
    with warnings_later(), BUILD:
        if not _update(lambda known: known | {(machine, key): trials}):
            _kept[machine, key] = trials


def merge_file(source: Path) -> Tunings:
    """Add the trials of another file to the user's file (see `merged`), and return them.

    Raises TuningError if the file contains no tunings, or if the user's file cannot be written.
    """
    more = load(source)
    with warnings_later(), BUILD:
        if not _update(lambda known: merged(known, more)):
            raise TuningError(
                f"{source}: cannot be added to the user's tunings, because there is no cache "
                "directory that q4jit can write to; set Q4JIT_CACHE_DIR"
            )
    return more


def merged(known: Tunings, more: Tunings) -> Tunings:
    """Return the trials of both; of two trials of one candidate, the later one."""
    both = dict(known)
    for machine_key, trials in more.items():
        latest = {trial.identity: trial for trial in both.get(machine_key, ())}
        for trial in trials:
            if trial.identity not in latest or latest[trial.identity].date <= trial.date:
                latest[trial.identity] = trial
        both[machine_key] = tuple(latest.values())
    return both


def _update(change: Callable[[Tunings], Tunings]) -> bool:
    """Change the user's file; return whether it could be written."""
    file = path()
    if file is None:
        return False
    try:
        make_private(file.parent)
        with _locked(file):
            write_atomically(file, to_text(change(_known(file))).encode())
    except OSError as error:
        _warn(file, f"cannot be written ({error})")
        return False
    return True


def _known(file: Path) -> Tunings:
    """Return the tunings in a file. A damaged file is renamed, so that it is not overwritten."""
    try:
        return load(file)
    except FileNotFoundError:
        return {}
    except TuningError as error:
        renamed = file.with_suffix(".damaged")
        file.replace(renamed)
        _warn(file, f"is damaged and was renamed to {renamed.name}: {error}")
        return {}


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep other processes from changing the file; the lock also ends with the process."""
    import fcntl  # only a search writes tunings, and other systems than Linux may lack it

    # a FIFO in its place must not let this process wait for a reader
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
    with os.fdopen(os.open(file.with_suffix(".lock"), flags, 0o600), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _warn(file: Path, problem: str) -> None:
    warn(f"the file of tunings {file} {problem}", CacheWarning)


# --- files ----------------------------------------------------------------------------------------


def to_text(tunings: Tunings) -> str:
    """Return JSON that `parse` reads, sorted; the fastest trial of a product comes first."""
    entries = []
    for (machine, key), trials in sorted(tunings.items()):
        ordered = sorted(trials, key=lambda t: (t.us is None, t.us or 0.0, t.name))
        as_json = [asdict(t) | {"constants": dict(t.constants)} for t in ordered]
        entries.append({**asdict(machine), **asdict(key), "trials": as_json})
    return json.dumps({_HEADER: VERSION, "tunings": entries}, indent=1, allow_nan=False) + "\n"


def load(file: Path) -> Tunings:
    """Return the tunings in a file. Raises TuningError for other contents, and OSError."""
    try:
        text = read_regular(file, _MOST_BYTES).decode()
    except UnsuitableError as error:
        raise TuningError(str(error)) from None
    except UnicodeDecodeError as error:
        got = f"bytes that are not UTF-8 ({error})"
        raise TuningError(expected(_EXPORTED, got, where=str(file))) from None
    return parse(text, str(file))


def parse(text: str, where: str) -> Tunings:
    """Return tunings from JSON. Raises TuningError; `where` begins its message."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"invalid JSON ({error})"
        raise TuningError(expected(_EXPORTED, got, where=where)) from None
    check_fields(data, where, {_HEADER: ANYTHING, "tunings": ANYTHING}, error=TuningError)
    if type(data[_HEADER]) is not int or data[_HEADER] != VERSION:
        got = shown(data[_HEADER])
        raise TuningError(expected(str(VERSION), got, where=f"{where}: {_HEADER}"))
    tunings: Tunings = {}
    for i, entry in enumerate(_list(data["tunings"], f"{where}: tunings")):
        entry_where = f"{where}: tunings[{i}]"
        machine, key, trials = _entry(entry, entry_where)
        if (machine, key) in tunings:
            raise TuningError(f"{entry_where}: a second entry for {key} on {machine.device}")
        tunings[machine, key] = trials
    return tunings


_EXPORTED: Final = "a file that q4jit tune --export wrote"
_RENAMED: Final = {"groups": "wave_panels"}  # the name in files of q4jit 0.1


def _entry(data: Any, where: str) -> tuple[Machine, Key, tuple[Trial, ...]]:
    rules = _MACHINE_RULES | _KEY_RULES | {"trials": ANYTHING}
    check_fields(data, where, rules, error=TuningError)
    machine = Machine(**{name: data[name] for name in _names(Machine)})
    key = Key(**{name: data[name] for name in _names(Key)})
    trials = [
        _trial(each, f"{where}.trials[{i}]")
        for i, each in enumerate(_list(data["trials"], f"{where}.trials"))
    ]
    if len({trial.identity for trial in trials}) < len(trials):
        raise TuningError(f"{where}: two trials of the same candidate")
    return machine, key, tuple(trials)


def _trial(data: Any, where: str) -> Trial:
    check_fields(data, where, _TRIAL_RULES, error=TuningError)
    if (data["us"] is None) != bool(data["rejected"]):
        got = "neither" if data["us"] is None else "both"
        raise TuningError(expected("either us or rejected", got, where=where))
    constants = {_RENAMED.get(name, name): value for name, value in data["constants"].items()}
    return Trial(**data | {"constants": tuple(sorted(constants.items()))})


def _names(kind: type[Machine | Key | Trial]) -> set[str]:
    return {each.name for each in fields(kind)}


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise TuningError(expected("a list", shown(data), where=where))
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
    # dates are compared as text, so there must be only one way to write them
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
    "constants": (_are_constants, "names, each with a whole number or a name"),
    "text": (lambda v: isinstance(v, str) and bool(_HASH.fullmatch(v)), "16 hexadecimal digits"),
    "us": (lambda v: v is None or (_is_number(v) and v > 0), "microseconds, or null"),
    "error": (lambda v: v is None or _is_number(v), "a number from 0, or null"),
    "rejected": (lambda v: v == "" or _is_text(4000)(v), "a reason, or an empty text"),
    "date": (_is_date, "a date like 2026-01-31T12:00:00+00:00"),
}
