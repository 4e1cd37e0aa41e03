"""Targets: what a level permits, and which machine runs its code."""

from dataclasses import replace

import pytest

from q4jit import targets
from q4jit.targets import CPU_ARCHS, Target, find_target, runs_here

LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")


def test_levels_grow() -> None:
    assert CPU_ARCHS["x86-64"] < CPU_ARCHS["x86-64-v3"] < CPU_ARCHS["x86-64-v4"]


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_machine_that_lacks_any_feature_of_a_level_does_not_run_it(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = find_target(f"cpu:{level}")
    monkeypatch.setattr(targets, "host_target", lambda: full)
    assert runs_here(full)
    assert {"bmi", "bmi2", "lzcnt", "movbe", "cx16"} <= full.features  # LLVM takes them too
    for feature in full.features:
        machine = replace(full, features=full.features - {feature})
        monkeypatch.setattr(targets, "host_target", lambda machine=machine: machine)
        assert not runs_here(full), feature


def test_what_is_said_of_cpus_is_not_asked_of_others() -> None:
    other = Target("other", "arch")
    assert not runs_here(other)
    for name in ("family", "triple", "vector_registers", "vector_bytes"):
        with pytest.raises(AssertionError):
            getattr(other, name)
