"""Targets: the features of levels, and the machines that run their code."""

from dataclasses import replace

import pytest

from q4jit import targets
from q4jit.errors import TargetError
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


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("gfx1100", "(did you mean 'hip:gfx1100'?)"),
        ("hip:gfx1101x", "(did you mean 'hip:gfx1101'?)"),
        ("x" * 10_000, "known targets: cpu, cpu:ARCH"),
    ],
)
@pytest.mark.parametrize("calls", [False, True])
def test_an_unknown_target_is_refused_with_a_short_list(name: str, part: str, calls: bool) -> None:
    with pytest.raises(TargetError) as caught:
        find_target(name, calls=calls)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 600
    assert ("cuda:NUMBER" in str(caught.value)) == (calls and not name.startswith("hip"))


@pytest.mark.parametrize(
    ("name", "device"), [("gpu", "hip"), ("rocm", "hip"), ("amd", "hip"), ("nvidia", "cuda")]
)
def test_other_names_of_a_gpu(name: str, device: str) -> None:
    with pytest.raises(TargetError, match=rf"\(did you mean '{device}'\?\)"):
        find_target(name, calls=True)


@pytest.mark.parametrize("name", ["hip", "hip:1", "cuda", "cuda:0"])
def test_the_name_of_a_device_is_no_target(name: str) -> None:
    with pytest.raises(TargetError, match=rf"^'{name}' names a device .*such as 'hip:gfx1100'"):
        find_target(name)
