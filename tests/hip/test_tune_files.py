"""Files of tunings: reading, writing, merging, and the checks of every field."""

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
from tests.support.tuning_files import FAST, KEY, MACHINE, SLOW, TRIALS, TUNINGS, WRONG


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache directory of its own, and a process that has measured nothing."""
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the trials that this process knows."""
    monkeypatch.setattr(tunings, "_kept", {})
    monkeypatch.setattr(tunings, "_read", {})


def test_a_file_is_read_back_and_sorted() -> None:
    other = replace(KEY, m=8)
    both = TUNINGS | {(MACHINE, other): (SLOW,)}
    text = tunings.to_text(both)
    assert tunings.parse(text, "here") == both
    reverse = dict(reversed(both.items())) | {(MACHINE, KEY): (WRONG, SLOW, FAST)}
    assert tunings.to_text(reverse) == text


def test_the_best_trial_is_the_fastest_that_was_not_rejected() -> None:
    assert tunings.best(TRIALS) == FAST
    assert tunings.best((WRONG,)) is None
    assert tunings.best(()) is None


def test_later_processes_read_the_kept_trials(
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


def test_trials_of_another_process_are_seen(directory: Path) -> None:
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


def test_processes_that_write_at_the_same_time_lose_no_trial() -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(_keep_one, range(1, 21))
    assert {key.n for _, key in tunings.stored()} == set(range(1, 21))


def test_without_a_directory_the_process_keeps_its_trials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tunings, "path", lambda: None)
    tunings.keep(MACHINE, KEY, TRIALS)
    choice = tunings.find("gfx1100", MACHINE)(KEY)
    assert choice is not None
    assert choice.origin == f"this process, {FAST.date}"


def test_an_unwritable_directory_gives_a_warning(directory: Path) -> None:
    directory.write_text("no directory")
    with pytest.warns(CacheWarning, match=r"tunings\.json cannot be written"):
        tunings.keep(MACHINE, KEY, TRIALS)


# --- damaged files --------------------------------------------------------------------------------


def test_a_damaged_file_warns_once_and_is_renamed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.mkdir()
    file = directory / "tunings.json"
    file.write_text("{")
    message = f"{file} is ignored: {file}: expected a file that q4jit tune --export wrote, got inv"
    with pytest.warns(CacheWarning, match=re.escape(message)):
        assert tunings.stored() == {}
    assert tunings.stored() == {}
    with pytest.warns(CacheWarning, match=r"is damaged and was renamed to tunings\.damaged"):
        tunings.keep(MACHINE, KEY, TRIALS)
    assert file.with_suffix(".damaged").read_text() == "{"
    forget(monkeypatch)
    assert tunings.stored() == TUNINGS


def _entry(data: Any) -> Any:
    return data["tunings"][0]


def _trial(data: Any) -> Any:
    return _entry(data)["trials"][0]


def _set(part: Callable[[Any], Any], name: str, value: object) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        part(data)[name] = value

    return change


def _top(data: Any) -> Any:
    return data


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (_set(_top, "q4jit_tunings", 2), ["here: q4jit_tunings: expected 1, got 2"]),
        (_set(_top, "q4jit_tunings", True), ["here: q4jit_tunings: expected 1, got True"]),
        (_set(_top, "more", 1), ["here: ", "['more', 'q4jit_tunings', 'tunings']"]),
        (_set(_top, "tunings", {}), ["here: tunings: expected a list, got {}"]),
        (_set(_top, "tunings", [1]), ["here: tunings[0]: ", " 1", "['arch'"]),
        (_set(_entry, "more", 1), ["here: tunings[0]: ", "'more'"]),
        (_set(_entry, "device", "a\nb"), ["here: tunings[0].device: ", "'a\\nb'"]),
        (_set(_entry, "device", ""), ["tunings[0].device: ", "a device's name"]),
        (_set(_entry, "arch", "gfx1"), ["here: tunings[0].arch: ", "'gfx1'", "one of gfx906"]),
        (_set(_entry, "arch", ["gfx1100"]), ["tunings[0].arch: ", "['gfx1100']"]),
        (_set(_entry, "compiler", 7), ["tunings[0].compiler: ", " 7"]),
        (_set(_entry, "k", 0), ["tunings[0].k: ", " 0", "a whole number from 1"]),
        (_set(_entry, "n", True), ["tunings[0].n: ", " True"]),
        (_set(_entry, "m", 1 << 31), ["tunings[0].m: ", " 2147483648"]),
        (_set(_entry, "format", "Q4_0+"), ["tunings[0].format: ", "'Q4_0+'"]),
        (_set(_entry, "precision", "f64"), ["tunings[0].precision: ", "one of f32, f16, i8"]),
        (_set(_entry, "trials", None), ["tunings[0].trials: expected a list, got None"]),
        (_set(_trial, "more", 1), ["tunings[0].trials[0]: ", "['constants'"]),
        (_set(_trial, "schedule", "a b"), ["trials[0].schedule: ", "'a b'"]),
        (_set(_trial, "constants", {"block_size": 1.5}), ["trials[0].constants: ", "1.5"]),
        (_set(_trial, "constants", {"block_size": True}), ["trials[0].constants: ", "True"]),
        (_set(_trial, "constants", {"block_size": -1}), ["trials[0].constants: ", "-1"]),
        (_set(_trial, "constants", {"layout": 'x"; }'}), ["trials[0].constants: ", 'x"; }']),
        (_set(_trial, "constants", {"a b": 1}), ["trials[0].constants: ", "a b"]),
        (_set(_trial, "text", "0" * 15), ["trials[0].text: ", f"'{'0' * 15}'"]),
        (_set(_trial, "us", 0), ["trials[0].us: ", " 0", "microseconds, or null"]),
        (_set(_trial, "us", 10**400), ["trials[0].us: ", " 1000"]),
        (_set(_trial, "us", "5"), ["trials[0].us: ", "'5'"]),
        (_set(_trial, "us", None), ["trials[0]: expected either us or rejected, got neither"]),
        (_set(_trial, "rejected", "slow"), ["trials[0]: expected either us or rejected, got both"]),
        (_set(_trial, "rejected", 0), ["trials[0].rejected: ", " 0"]),
        (_set(_trial, "error", -1), ["trials[0].error: ", " -1"]),
        (_set(_trial, "date", "yesterday"), ["trials[0].date: ", "'yesterday'"]),
        (_set(_trial, "date", "2026-01-31T12:00:00"), ["trials[0].date: ", "12:00:00'"]),
        (_set(_trial, "date", "20260131T120000+00:00"), ["trials[0].date: ", "'20260131T12"]),
        (lambda data: data["tunings"].append(data["tunings"][0]), ["a second entry for Q4_0"]),
        (
            lambda data: _entry(data)["trials"].append(_trial(data)),
            ["tunings[0]: two trials of the same candidate"],
        ),
    ],
)
def test_every_field_is_checked(change: Callable[[Any], None], fragments: list[str]) -> None:
    data = json.loads(tunings.to_text(TUNINGS))
    tunings.parse(json.dumps(data), "here")
    changed = copy.deepcopy(data)
    change(changed)
    with pytest.raises(TuningError) as caught:
        tunings.parse(json.dumps(changed), "here")
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_time_is_a_number(number: str) -> None:
    text = tunings.to_text(TUNINGS).replace('"us": 5.5', f'"us": {number}')
    with pytest.raises(TuningError, match=r"trials\[0\]\.us: "):
        tunings.parse(text, "here")


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "[]", "null", '{"q4jit_tunings": 1}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(TuningError, match=r"^here: "):
        tunings.parse(text, "here")


def test_an_error_names_a_file_without_tunings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(b"\xff")
    with pytest.raises(TuningError, match=rf"^{file}: expected a file .*, got .* not UTF-8"):
        tunings.merge_file(file)
    monkeypatch.setattr(tunings, "_MOST_BYTES", 0)
    with pytest.raises(TuningError, match=f"^{file}: expected at most 0 bytes, got 1$"):
        tunings.merge_file(file)


# --- merging, and the defaults that q4jit ships ---------------------------------------------------


def test_a_merge_keeps_the_later_of_two_trials(
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
    file.write_text(tunings.to_text(TUNINGS))
    monkeypatch.setattr(tunings, "path", lambda: None)
    with pytest.raises(TuningError, match="Q4JIT_CACHE_DIR"):
        tunings.merge_file(file)


def test_defaults_serve_products_that_were_not_measured(
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


def test_shipped_files_are_valid_and_named_after_archs() -> None:
    folder = Path(tunings.__file__).with_name("tuned")
    names = [file.stem for file in folder.iterdir()]
    assert "sm_90" in names
    assert set(names) <= set(HIP_ARCHS)
    for arch in HIP_ARCHS:
        tunings.shipped.cache_clear()
        tunings.shipped(arch)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_gives_a_warning(directory: Path) -> None:
    tunings.keep(MACHINE, KEY, TRIALS)
    (directory / "tunings.json").chmod(0)
    with pytest.warns(CacheWarning, match="is ignored"):
        tunings.stored()


@pytest.mark.parametrize("name", ["tunings.json", "tunings.lock"])
def test_nothing_waits_for_a_fifo(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path))
    os.mkfifo(tmp_path / name)
    if name == "tunings.json":
        with pytest.warns(CacheWarning, match="expected a regular file, got prw"):
            assert tunings.stored() == tunings._kept
        with pytest.warns(CacheWarning, match=r"was renamed to tunings\.damaged"):
            assert tunings._update(dict)
    else:
        assert tunings._update(dict)
    assert tunings.load(tmp_path / "tunings.json") == {}
