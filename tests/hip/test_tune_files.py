"""Files of tunings: what they say, who reads them, and what is refused in one from elsewhere."""

import copy
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q4jit.errors import CacheWarning, TuningError
from q4jit.hip import tunings
from q4jit.hip.tunings import Key, Machine
from q4jit.targets import HIP_ARCHS
from tests.support.tuning_files import FAST, FOUND, KEY, MACHINE, SLOW, TRIALS, WRONG


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and a process that has measured nothing."""
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process has it."""
    monkeypatch.setattr(tunings, "_kept", {})
    monkeypatch.setattr(tunings, "_read", {})


def test_what_is_written_is_read_and_the_order_is_one() -> None:
    other = replace(KEY, m=8)
    found = FOUND | {(MACHINE, other): (SLOW,)}
    text = tunings.to_text(found)
    assert tunings.parse(text, "here") == found
    reverse = dict(reversed(found.items())) | {(MACHINE, KEY): (WRONG, SLOW, FAST)}
    assert tunings.to_text(reverse) == text


def test_the_fastest_is_chosen_and_a_rejected_one_never() -> None:
    assert tunings.best(TRIALS) == FAST
    assert tunings.best((WRONG,)) is None
    assert tunings.best(()) is None


def test_later_processes_find_what_was_kept(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunings.keep(MACHINE, KEY, TRIALS)
    tunings.keep(MACHINE, replace(KEY, m=8), (SLOW,))
    forget(monkeypatch)
    choice = tunings.find("gfx1100", MACHINE)(KEY)
    assert choice is not None
    assert choice.trial == FAST
    assert choice.origin == f"{directory / 'tunings.json'}, {FAST.date}"
    assert len(tunings.stored()) == 2
    assert sorted(p.name for p in directory.iterdir()) == ["tunings.json", "tunings.lock"]


def test_what_another_process_adds_is_seen(directory: Path) -> None:
    tunings.keep(MACHINE, KEY, TRIALS)
    known = tunings.load(directory / "tunings.json")
    more = known | {(MACHINE, replace(KEY, k=32)): (SLOW,)}
    (directory / "tunings.json").write_text(tunings.to_text(more))
    assert tunings.stored() == more


@pytest.mark.parametrize(
    ("machine", "key"),
    [
        (replace(MACHINE, device="Other"), KEY),
        (replace(MACHINE, compiler="fake 2.0"), KEY),
        (MACHINE, replace(KEY, k=8192)),
        (MACHINE, replace(KEY, n=8192)),
        (MACHINE, replace(KEY, format="Q8_0")),
        (MACHINE, replace(KEY, format="Q4_0+Q4_0")),
        (MACHINE, replace(KEY, m=2)),
        (MACHINE, replace(KEY, precision="i8")),
        (None, KEY),
    ],
)
def test_a_choice_is_for_one_machine_and_one_product(machine: Machine | None, key: Key) -> None:
    tunings.keep(MACHINE, KEY, TRIALS)
    assert tunings.find("gfx1100", machine)(key) is None


def _keep_one(number: int) -> None:
    tunings.keep(MACHINE, replace(KEY, n=number), (FAST,))


def test_processes_that_write_at_a_time_lose_nothing() -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(_keep_one, range(1, 21))
    assert {key.n for _, key in tunings.stored()} == set(range(1, 21))


def test_without_a_directory_the_process_itself_remembers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tunings, "path", lambda: None)
    tunings.keep(MACHINE, KEY, TRIALS)
    choice = tunings.find("gfx1100", MACHINE)(KEY)
    assert choice is not None
    assert choice.origin == f"this process, {FAST.date}"


def test_a_directory_that_cannot_be_written_costs_a_warning(directory: Path) -> None:
    directory.write_text("no directory")
    with pytest.warns(CacheWarning, match=r"tunings\.json cannot be written"):
        tunings.keep(MACHINE, KEY, TRIALS)


# --- damaged files --------------------------------------------------------------------------------


def test_a_damaged_file_warns_once_and_is_moved_aside(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.mkdir()
    file = directory / "tunings.json"
    file.write_text("{")
    with pytest.warns(CacheWarning, match=re.escape(f"{file} is not used: {file}: found no JSON")):
        assert tunings.stored() == {}
    assert tunings.stored() == {}
    with pytest.warns(CacheWarning, match=r"was damaged and is tunings\.damaged now"):
        tunings.keep(MACHINE, KEY, TRIALS)
    assert file.with_suffix(".damaged").read_text() == "{"
    forget(monkeypatch)
    assert tunings.stored() == FOUND


def _entry(data: Any) -> Any:
    return data["tunings"][0]


def _trial(data: Any) -> Any:
    return _entry(data)["trials"][0]


def _set(place: Callable[[Any], Any], name: str, value: object) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        place(data)[name] = value

    return change


def _top(data: Any) -> Any:
    return data


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_set(_top, "q4jit_tunings", 2), "here: found q4jit_tunings 2, accepted is 1"),
        (_set(_top, "q4jit_tunings", True), "found q4jit_tunings True"),
        (_set(_top, "more", 1), "got ['more', 'q4jit_tunings', 'tunings']"),
        (_set(_top, "tunings", {}), "here: tunings: found {}, accepted is a list"),
        (_set(_top, "tunings", [1]), "here: tunings[0]: expected the fields ['arch'"),
        (_set(_entry, "more", 1), "'trials'], got ['arch'"),
        (
            _set(_entry, "device", "a\nb"),
            "here: tunings[0].device: expected a device's name, got 'a\\nb'",
        ),
        (_set(_entry, "device", ""), "expected a device's name, got ''"),
        (_set(_entry, "arch", "gfx1"), "here: tunings[0].arch: expected one of gfx906"),
        (_set(_entry, "arch", ["gfx1100"]), "got ['gfx1100']"),
        (_set(_entry, "compiler", 7), "a compiler's version and flags, got 7"),
        (_set(_entry, "k", 0), "tunings[0].k: expected a whole number from 1, got 0"),
        (_set(_entry, "n", True), "tunings[0].n: expected a whole number from 1, got True"),
        (
            _set(_entry, "m", 1 << 31),
            "tunings[0].m: expected a whole number from 1, got 2147483648",
        ),
        (_set(_entry, "format", "Q4_0+"), "got 'Q4_0+'"),
        (_set(_entry, "precision", "f64"), "expected one of f32, f16, i8, got 'f64'"),
        (_set(_entry, "trials", None), "tunings[0].trials: found None, accepted is a list"),
        (_set(_trial, "more", 1), "tunings[0].trials[0]: expected the fields ['constants'"),
        (
            _set(_trial, "schedule", "a b"),
            "trials[0].schedule: expected a schedule's name, got 'a b'",
        ),
        (
            _set(_trial, "constants", {"block_size": 1.5}),
            "trials[0].constants: expected names with whole numbers",
        ),
        (
            _set(_trial, "constants", {"block_size": True}),
            "trials[0].constants: expected names with whole numbers",
        ),
        (
            _set(_trial, "constants", {"block_size": -1}),
            "trials[0].constants: expected names with whole numbers",
        ),
        (
            _set(_trial, "constants", {"layout": 'x"; }'}),
            "trials[0].constants: expected names with whole numbers",
        ),
        (
            _set(_trial, "constants", {"a b": 1}),
            "trials[0].constants: expected names with whole numbers",
        ),
        (_set(_trial, "text", "0" * 15), "trials[0].text: expected 16 hexadecimal digits, got"),
        (_set(_trial, "us", 0), "trials[0].us: expected microseconds, or null, got 0"),
        (_set(_trial, "us", 10**400), "microseconds, or null, got 1000"),
        (_set(_trial, "us", "5"), "microseconds, or null, got '5'"),
        (_set(_trial, "us", None), "accepted is one of us and rejected"),
        (_set(_trial, "rejected", "too slow"), "accepted is one of us and rejected"),
        (
            _set(_trial, "rejected", 0),
            "trials[0].rejected: expected a reason, or an empty text, got 0",
        ),
        (_set(_trial, "error", -1), "trials[0].error: expected a number from 0, or null, got -1"),
        (_set(_trial, "date", "yesterday"), "00:00, got 'yesterday'"),
        (_set(_trial, "date", "2026-01-31T12:00:00"), "trials[0].date: expected a date"),
        (_set(_trial, "date", "20260131T120000+00:00"), "trials[0].date: expected a date"),
        (lambda data: data["tunings"].append(data["tunings"][0]), "a second entry for Q4_0"),
        (lambda data: _entry(data)["trials"].append(_trial(data)), "one candidate twice"),
    ],
)
def test_every_field_is_checked(change: Callable[[Any], None], found: str) -> None:
    data = json.loads(tunings.to_text(FOUND))
    tunings.parse(json.dumps(data), "here")
    changed = copy.deepcopy(data)
    change(changed)
    with pytest.raises(TuningError, match=re.escape(found)):
        tunings.parse(json.dumps(changed), "here")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_time_is_a_number(number: str) -> None:
    text = tunings.to_text(FOUND).replace('"us": 5.5', f'"us": {number}')
    with pytest.raises(TuningError, match=r"trials\[0\]\.us: expected microseconds"):
        tunings.parse(text, "here")


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "[]", "null", '{"q4jit_tunings": 1}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(TuningError, match=r"^here: (expected|found) "):
        tunings.parse(text, "here")


def test_other_files_are_refused_by_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(b"\xff")
    with pytest.raises(TuningError, match=re.escape(f"{file}: found bytes that are no UTF-8")):
        tunings.merge_file(file)
    monkeypatch.setattr(tunings, "_MOST_BYTES", 0)
    with pytest.raises(TuningError, match=re.escape(f"{file}: found 1 bytes, accepted are 0")):
        tunings.merge_file(file)


# --- merging, and what is shipped -----------------------------------------------------------------


def test_of_two_trials_of_a_candidate_the_later_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = replace(FAST, us=20.0, date="2027-01-01T00:00:00+00:00")
    earlier = replace(SLOW, us=1.0, date="2020-01-01T00:00:00+00:00")
    other = Machine("Other", "sm_90", "nvrtc 13.0")
    file = tmp_path / "other.json"
    file.write_text(tunings.to_text({(MACHINE, KEY): (later, earlier), (other, KEY): (FAST,)}))
    tunings.keep(MACHINE, KEY, TRIALS)
    forget(monkeypatch)
    tunings.merge_file(file)
    assert tunings.stored() == {(MACHINE, KEY): (SLOW, later, WRONG), (other, KEY): (FAST,)}


def test_a_merge_without_a_directory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.json"
    file.write_text(tunings.to_text(FOUND))
    monkeypatch.setattr(tunings, "path", lambda: None)
    with pytest.raises(TuningError, match="Q4JIT_CACHE_DIR"):
        tunings.merge_file(file)


def test_what_is_shipped_serves_where_nothing_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = replace(MACHINE, device="Other")
    defaults = {(MACHINE, KEY): (SLOW,), (other, KEY): (FAST,)}
    monkeypatch.setattr(tunings, "shipped", lambda arch: defaults)
    for machine, trial in ((MACHINE, SLOW), (other, FAST)):
        choice = tunings.find("gfx1100", machine)(KEY)
        assert choice is not None
        assert choice.trial == trial
        assert choice.origin == f"defaults of q4jit, measured on {machine.device}, {trial.date}"
    assert tunings.find("gfx1100")(KEY) is not None
    assert tunings.find("gfx1100")(replace(KEY, m=2)) is None
    tunings.keep(MACHINE, KEY, TRIALS)
    choice = tunings.find("gfx1100", MACHINE)(KEY)
    assert choice is not None
    assert choice.trial == FAST


def test_shipped_files_are_sound_and_named_after_archs() -> None:
    folder = Path(tunings.__file__).with_name("tuned")
    names = [file.stem for file in folder.iterdir()]
    assert "sm_90" in names
    assert set(names) <= set(HIP_ARCHS)
    for arch in HIP_ARCHS:
        tunings.shipped.cache_clear()
        tunings.shipped(arch)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_costs_a_warning(directory: Path) -> None:
    tunings.keep(MACHINE, KEY, TRIALS)
    (directory / "tunings.json").chmod(0)
    with pytest.warns(CacheWarning, match="is not used"):
        tunings.stored()
