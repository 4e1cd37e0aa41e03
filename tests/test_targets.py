"""Targets: the features of levels, and the machines that run their code."""

from dataclasses import replace

import pytest

from q4jit import targets
from q4jit.targets import CPU_ARCHS, Target, find_target, runs_here

LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")


def test_levels_grow() -> None:
    assert CPU_ARCHS["x86-64"] < CPU_ARCHS["x86-64-v3"] < CPU_ARCHS["x86-64-v4"]


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_machine_without_a_feature_of_a_level_does_not_run_it(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = find_target(f"cpu:{level}")
    monkeypatch.setattr(targets, "host_target", lambda: full)
    assert runs_here(full)
    assert {"bmi", "bmi2", "lzcnt", "movbe", "cx16"} <= full.features  # LLVM uses these as well
    for feature in full.features:
        machine = replace(full, features=full.features - {feature})
        monkeypatch.setattr(targets, "host_target", lambda machine=machine: machine)
        assert not runs_here(full), feature


def test_only_cpus_have_a_family_and_registers() -> None:
    other = Target("other", "arch")
    assert not runs_here(other)
    for name in ("family", "triple", "vector_registers", "vector_bytes"):
        with pytest.raises(AssertionError):
            getattr(other, name)
