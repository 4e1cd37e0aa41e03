"""The pages in docs/: examples run, commands parse, links lead somewhere, tables are complete."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from q4jit import specialize
from q4jit.targets import CPU_ARCHS, HIP_ARCHS
from q4jit.tools.cli.main import make_parser
from tests.support.examples import run_example
from tests.support.paths import ROOT
from tests.support.tools import model_file

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def examples(name: str) -> list[str]:
    """Return the Python programs of a page."""
    return re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)


def test_the_example_of_containers_runs(tmp_path: Path) -> None:
    prelude = """
import numpy as np
from q4jit import quantize, specialize

x = np.ones((2, 64), np.float32)
gate, up = (quantize(np.eye(64, dtype=np.float32) * n, "F32") for n in (2, 3))
"""
    _, example, _ = examples("functions.md")
    check = "print(type(results).__name__, *(v[0, 0] for v in results.values()))"
    assert run_example(f"{prelude}{example}\n{check}", tmp_path) == "dict 2.0 3.0\n"


def test_the_example_of_experts_runs(tmp_path: Path) -> None:
    prelude = """
import numpy as np
from q4jit import ExpertTensor, quantize, specialize

x, ids = np.ones((2, 64), np.float32), np.array([[0, 1, 3], [2, 2, 0]])
weights = np.full((2, 3), 1 / 3, np.float32)
gate = up = down = ExpertTensor.stack(
    [quantize(np.eye(64, dtype=np.float32) * n, "F16") for n in range(4)]
)
"""
    *_, example = examples("functions.md")
    check = """
print(y.shape, np.abs(y - feed_forward.py_func(x, gate, up, down, ids, weights)).max() < 1e-5)
print(feed_forward.explain())
"""
    printed = run_example(f"{prelude}{example}\n{check}", tmp_path)
    assert printed.startswith("(2, 64) True\n")
    assert "vecmat(v0, gate[ids])" in printed


@pytest.mark.model
def test_the_example_of_functions_runs(tmp_path: Path) -> None:
    example, *_ = examples("functions.md")
    (tmp_path / "model.gguf").symlink_to(model_file())
    printed = run_example(example, tmp_path)
    assert "define void @q4jit_swiglu(ptr %args)" in printed
    assert "// swiglu for hip:gfx1100, gemv" in printed
    assert "fmla" in printed
    assert "@ gate    Q4_1 [576, 1536]" in printed


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{path.name}: {link}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_parse(path: Path) -> None:
    parser = make_parser()
    fenced = re.findall(r"```(?:sh|console)\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    text = re.sub(r"\\\n\s*", "", "\n".join(fenced))
    for line in re.findall(r"^(?:\$ )?q4jit (.*?)(?: {2,}#.*)?$", text, re.MULTILINE):
        assert parser.parse_args(shlex.split(line)).run, line


def test_options_that_a_page_names_exist() -> None:
    build = make_parser().parse_args(["build", "--arch", "gfx1100", "--out", "kernels"]).parser
    for option in re.findall(r"`(--[a-z-]+)", page("aot.md")):
        assert option in build.format_help()


def test_every_environment_variable_is_in_the_table() -> None:
    read = set(re.findall(r"Q4JIT_\w+", (ROOT / "q4jit" / "config.py").read_text("utf-8")))
    assert read == set(re.findall(r"^\| `(Q4JIT_\w+)`", page("reference.md"), re.MULTILINE))


def test_every_dependency_has_its_reason() -> None:
    table = page("reference.md").partition("## Dependencies")[2]
    rows = re.findall(r"^\| (?:`(\w+)`: )?([\w, -]+) \|", table, re.MULTILINE)
    listed = {(extra, name) for extra, names in rows for name in names.split(", ")}
    wanted = {("", re.match(r"[\w-]+", each)[0]) for each in PROJECT["dependencies"]}  # type: ignore[index]  # each begins with a name
    for extra, packages in PROJECT["optional-dependencies"].items():
        for package in packages:
            name = re.match(r"[\w-]+", package)[0]  # type: ignore[index]  # the same
            if name != "q4jit":
                wanted.add((extra, name))
    missing = {
        (extra, name)
        for extra, name in wanted
        if (extra, name) not in listed
        and not (extra == "test" and ("cross", name) in listed)
        and not (extra == "test" and ("nvidia", name) in listed)
    }
    assert not missing


def test_targets_are_the_known_ones() -> None:
    table = page("gpus.md").partition("## Targets")[2]
    named = set(re.findall(r"(?:gfx\w+|sm_\d+)", table))
    assert {"gfx906", "gfx1100", "sm_90"} <= named <= HIP_ARCHS.keys()
    ranges = {f"gfx{n}" for n in (*range(1030, 1037), *range(1100, 1104))}
    assert named | ranges == set(HIP_ARCHS)
    for name in re.findall(r"`(cpu[\w:+-]*)`", table):
        specialize(lambda x: x, target=name)
    assert {f"cpu:{arch}" for arch in CPU_ARCHS} <= set(re.findall(r"`(cpu[\w:+-]*)`", table))
    for name in re.findall(r'"((?:hip|cuda|cpu)(?::\w+)?)"', page("gpus.md")):
        if name != "cuda":  # PyTorch's name of a device
            specialize(lambda x: x, target=name)


def test_classifiers_name_the_pythons_that_ci_runs() -> None:
    named = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    newer = re.search(r"for minor in ([\d ]+); do", run)
    assert newer is not None
    assert named == {"3.11"} | {f"3.{minor}" for minor in newer[1].split()}


def test_ci_runs_the_oldest_packages_that_are_accepted() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    versions = re.findall(r"^OLDEST_(?:VERSIONS|TORCH) := (.*)$", makefile, re.MULTILINE)
    pinned = dict(item.split("==") for line in versions for item in line.split())
    # float16 needs nothing, bfloat16 an optional package
    optional = PROJECT["optional-dependencies"]["torch"]
    bounds = dict(d.split(">=") for d in (*PROJECT["dependencies"], *optional))
    whole = {name: f"{bound}{'.0' * (2 - bound.count('.'))}" for name, bound in bounds.items()}
    assert pinned == whole
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for target in ("oldest", "oldest-torch"):
        assert f'make {target} PYTHON="$main"' in run.splitlines()


def test_ci_runs_the_tests_that_need_pytorch() -> None:
    """A marked test that `make test-torch` leaves out would never run in CI."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tests = re.search(r"^TORCH_TESTS := (.*)$", makefile, re.MULTILINE)
    assert tests is not None
    folders = [ROOT / "tests" / name for name in ("torch", "transformers")]  # their conftests mark
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if not set(folders) & set(path.parents) and re.search(r"mark\.torch\b", path.read_text("utf-8"))
    ]
    assert tests[1].split() == [*marked, "tests/torch", "tests/transformers"]
    check = re.search(r"^check: (.*?) ##", makefile, re.MULTILINE)
    assert check is not None
    assert {"test-torch", "lint-torch"} <= set(check[1].split())
    assert 'exec make check PYTHON="$main"' in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_source_that_imports_pytorch_has_its_types_checked() -> None:
    """`make lint`, which has no PyTorch, leaves out exactly what `make lint-torch` checks."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    left_out = re.compile("|".join(config["exclude"]))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    joined = makefile.replace("\\\n", "")
    sources = re.search(r"^TORCH_SOURCES := \$\(wildcard (.*)\)$", joined, re.MULTILINE)
    assert sources is not None
    checked = [ROOT / name for name in sources[1].split()]
    imports = re.compile(r"^(?:import|from) (?:(?:q4jit|tests\.support)\.)?torch\b", re.MULTILINE)
    for path in (p for root in config["files"] for p in (ROOT / root).rglob("*.py")):
        parents = {path, *path.parents}
        if imports.search(path.read_text(encoding="utf-8")):
            assert parents & set(checked), f"make lint-torch does not check {path}"
        names = [f"{p.relative_to(ROOT)}{'/' * p.is_dir()}" for p in parents if ROOT in p.parents]
        assert any(map(left_out.search, names)) == bool(parents & set(checked)), path
