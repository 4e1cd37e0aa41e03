"""Ahead-of-time builds: a program can launch the kernels from the files of the folder alone."""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.compilers.codeobject import code_object_arch, kernel_infos
from q4jit.compilers.find import find_compiler
from q4jit.errors import TargetError
from q4jit.frontend.specs import WeightSpec
from q4jit.hip.kernel import MAX_GRID_Y
from q4jit.hip.render import render_generic
from q4jit.hip.templates import template_directory
from q4jit.plan.options import PlanOptions
from q4jit.targets import Target, find_target
from q4jit.tools.aot.build import build as build_request
from q4jit.tools.aot.products import m_classes
from q4jit.tools.aot.request import BuildRequest
from q4jit.tools.cli.main import main
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, PLANAR
from tests.support.hip_host import compile_host
from tests.support.kernels import FLOAT_FORMATS, Weight, assert_contract, errors, random_x, weight
from tests.support.paths import ROOT
from tests.support.tools import lack, require_tool

K, N = 64, 37
SHAPE = ["--k", str(K), "--n", str(N), "--format", "q4_0"]
ARCHS = ("gfx1100", "gfx90a")


@pytest.fixture(autouse=True, scope="module")
def _pinned_compiler() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("Q4JIT_HIP_COMPILER", "ziglang")
        try:
            find_compiler(Target("hip", "gfx1100"))
        except TargetError as error:
            lack(str(error))
        yield


def build(out: Path, *more: str) -> dict[str, Any]:
    """Run the command and return the manifest."""
    assert main(["build", *more, "--out", str(out)]) == 0
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_bytes())
    return manifest


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a build for two archs and two classes of M, the larger with two launches."""
    out = tmp_path_factory.mktemp("aot") / "kernels"
    archs = [part for arch in ARCHS for part in ("--arch", arch)]
    return out, build(out, *SHAPE, *archs, "--m", "1", "--m", "20", "--m", "64")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the manifest ---------------------------------------------------------------------------------


def test_the_manifest_lists_every_file_with_its_hash(built: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = built
    files = contents(out)
    assert files.keys() == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256(files[name]).hexdigest()
        assert entry["size_bytes"] == len(files[name])
    named = {
        launch[key]
        for product in manifest["products"]
        for launch in product["launches"]
        for key in ("source", "code_object")
    }
    assert named | {manifest["header"]} == manifest["files"].keys()


def test_the_manifest_agrees_with_the_code_objects(built: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = built
    assert [(p["arch"], p["M"]) for p in manifest["products"]] == [
        (arch, rows) for arch in ARCHS for rows in ({"min": 1, "max": 1}, {"min": 17, "max": None})
    ]
    for product in manifest["products"]:
        assert (product["format"], product["K"], product["N"]) == ("Q4_0", K, N)
        assert product["wave"] == find_target(f"hip:{product['arch']}").hip.wave
        assert product["weight"]["size_bytes"] == 1536
        for launch in product["launches"]:
            data = (out / launch["code_object"]).read_bytes()
            assert code_object_arch(data) == product["arch"]
            (info,) = kernel_infos(data).values()
            assert info.name == launch["symbol"]
            assert info.lds_bytes == launch["static_lds_bytes"]
            assert launch["dynamic_lds_bytes"] == 0
            assert info.max_block_size == launch["block_size"]
            assert info.kernarg_bytes >= max(
                a["offset_bytes"] + a["size_bytes"] for a in launch["arguments"]
            )
            declared = declared_types((out / launch["source"]).read_text(), launch["symbol"])
            assert declared == [(a["name"], a["type"]) for a in launch["arguments"]]
            for argument, compiled in zip(launch["arguments"], info.arguments, strict=False):
                assert (argument["offset_bytes"], argument["size_bytes"]) == (
                    compiled.offset_bytes,
                    compiled.size_bytes,
                )
                assert (compiled.kind == "global_buffer") == argument["type"].endswith("*")
    last = manifest["products"][1]
    assert [launch["grid"]["rows_per_block"] for launch in last["launches"]] == [1, 64]
    assert [(s["name"], s["bytes_per_row"]) for s in last["scratch"]] == [
        ("x_terms", 6 * K),
        ("x_rough", 4),
    ]
    assert [s["size_bytes"] for s in last["scratch"]] == [f"{6 * K} * M", "4 * M"]
    assert [s["alignment_bytes"] for s in last["scratch"]] == [16, 4]
    assert {"requires_finite_scales", "alignment_bytes"} <= set(
        re.findall(r"\w+", " ".join(manifest["how_to_launch"]))
    )
    assert "ziglang" in manifest["compilers"]["gfx1100"]
    assert "--offload-arch=gfx1100" in manifest["compilers"]["gfx1100"]
    assert (
        " /" not in manifest["compilers"]["gfx1100"]
    )  # paths would make builds of two machines differ


def declared_types(text: str, symbol: str) -> list[tuple[str, str]]:
    match = re.search(rf"void {symbol}\(([^)]*)\)", text)
    assert match is not None
    short = {
        "u8": "unsigned char",
        "u16": "unsigned short",
        "u32": "unsigned int",
        "i64": "long long",
    }
    parts = [part.replace("__restrict__", "").split() for part in match[1].split(",")]
    spelled = {f"{name}{star}": f"{c}{star}" for name, c in short.items() for star in ("", "*")}
    return [(part[-1], " ".join(spelled.get(word, word) for word in part[:-1])) for part in parts]


def test_the_same_request_gives_the_same_bytes(
    built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = built
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    archs = [part for arch in ARCHS for part in ("--arch", arch)]
    build(tmp_path / "again", *SHAPE, *archs, "--m", "1", "--m", "17")
    assert contents(tmp_path / "again") == contents(out)


# --- launches from the folder alone ---------------------------------------------------------------


def on_host(text: str, arch: str) -> str:
    """Return a built text with the prelude of this machine instead of AMD's."""
    loader = jinja2.FileSystemLoader(str(template_directory()))
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=loader, autoescape=False, **options)  # type: ignore[arg-type]  # all are bools
    amd, host = (
        environment.get_template(f"prelude/{name}.hip.j2").render(
            arch=find_target(f"hip:{arch}").hip
        )
        for name in ("amd", "host")
    )
    assert text.count(amd) == 1
    return text.replace(amd, host)


def launched(
    out: Path, product: dict[str, Any], x: NDArray[np.float32], w: NDArray[np.uint8]
) -> Any:
    """Return y, computed as a manifest describes.

    Each array ends at the end of a page. Inputs are lengthened by their alignment, so that they
    start at no larger power of two than the manifest requires.
    """
    m = len(x)
    k, n = x.shape[1], N
    assert product["M"]["min"] <= m <= (product["M"]["max"] or m)
    numbers = {"M": m, "N": n, "K": k}
    memory: dict[str, Any] = {"x": x, "weights": w, "y": np.zeros((m, n), np.float32), **numbers}
    memory |= {s["name"]: np.zeros(s["bytes_per_row"] * m, np.uint8) for s in product["scratch"]}
    for launch in product["launches"]:
        text = on_host((out / launch["source"]).read_text(), product["arch"])
        program = compile_host(text, launch["symbol"])
        grid, arguments = launch["grid"], launch["arguments"]
        tiles = -(-m // grid["rows_per_block"])
        width = numbers.get(grid["x"], grid["x"])
        blocks = (width, min(tiles, grid["max_y"]), -(-tiles // grid["max_y"]))
        sizes = {a["role"]: a["alignment_bytes"] for a in arguments if "alignment_bytes" in a}
        results = program.run(
            blocks,
            launch["block_size"],
            [
                lengthened(memory[a["role"]], a["alignment_bytes"])
                if a["direction"] == "in" and "alignment_bytes" in a
                else memory[a["role"]]
                for a in arguments
            ],
            alignments={a["name"]: sizes[a["role"]] for a in arguments if a["role"] in sizes},
        )
        outputs = [a["role"] for a in arguments if a["direction"] == "out"]
        memory |= dict(zip(outputs, results, strict=True))
    return memory["y"]


def lengthened(array: NDArray[Any], more_bytes: int) -> NDArray[np.uint8]:
    """Return the bytes of an array, padded to an odd multiple of `more_bytes`."""
    raw = np.frombuffer(array.tobytes(), np.uint8)
    times = -(-raw.size // more_bytes)
    return np.pad(raw, (0, (times + 1 - times % 2) * more_bytes - raw.size))


@pytest.mark.parametrize("rows", [1, 20, 65])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_manifest_suffices_for_a_launch(
    built: tuple[Path, dict[str, Any]], arch: str, rows: int
) -> None:
    out, manifest = built
    (product,) = (
        p
        for p in manifest["products"]
        if p["arch"] == arch and p["M"]["min"] <= rows <= (p["M"]["max"] or rows)
    )
    w, x = weight("Q4_0", K, N), random_x(rows, K)
    assert_contract(launched(out, product, x, w.tensor._resident.blocks(PLANAR)), x, w)


def test_the_manifest_suffices_for_int8_products(tmp_path: Path) -> None:
    w, x = weight("Q6_K", 512, N), random_x(3, 512)
    arguments = ["--k", "512", "--n", str(N), "--format", "q6_k", "--precision", "i8"]
    (product,) = build(tmp_path, *arguments, "--arch", "gfx1100", "--m", "3")["products"]
    assert "x_quants" in {s["name"] for s in product["scratch"]}
    y = launched(tmp_path, product, x, w.tensor._resident.blocks(PLANAR))
    assert np.sqrt(np.mean(errors(y, x, w.values) ** 2)) < 2e-2


def test_the_gguf_layout_and_the_generic_entry(tmp_path: Path) -> None:
    w, x = weight("Q4_0", K, N), random_x(3, K)
    unpacked = build(tmp_path / "gguf", *SHAPE, "--arch", "gfx1100", "--m", "3", "--layout", "gguf")
    generic = build(
        tmp_path / "generic", "--entry", "generic", "--format", "q4_0", "--arch", "gfx1100"
    )
    for name, manifest in (("gguf", unpacked), ("generic", generic)):
        (product,) = manifest["products"]
        assert product["weight"]["layout"] == GGUF
        assert_contract(launched(tmp_path / name, product, x, w.tensor.raw), x, w)
    (launch,) = generic["products"][0]["launches"]
    assert launch["symbol"] == "q4_0_matmul_kernel"
    assert [(a["name"], a["type"]) for a in launch["arguments"]] == [
        ("activations", "const float*"),
        ("weights_q4_0", "const unsigned char*"),
        ("output", "float*"),
        ("m", "int"),
        ("n", "int"),
        ("k", "int"),
    ]
    assert launch["grid"]["x"] == "N"


@pytest.mark.parametrize("arch", ["gfx1100", "gfx90a"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_generic_kernel_of_every_format(name: str, arch: str) -> None:
    k = (
        4096 + 512 if name not in FLOAT_FORMATS else 4096 + 17
    )  # more than one chunk, and a remainder
    assert_generic(weight(name, k, 5), random_x(3, k), arch, grid=(5, 3))


def test_generic_rows_beyond_the_y_axis() -> None:
    w, x = weight("Q4_0", 32, 1), random_x(MAX_GRID_Y + 3, 32)
    assert_generic(w, x, "gfx1100", grid=(1, MAX_GRID_Y, 2), block_size=32, seeds=(1,))


def assert_generic(
    w: Weight,
    x: NDArray[np.float32],
    arch: str,
    *,
    grid: Sequence[int],
    block_size: int = 256,
    **options: Any,
) -> None:
    fmt, n = FORMATS[w.tensor.format], w.tensor.shape[1]
    source = render_generic(fmt, find_target(f"hip:{arch}"), block_size, "host")
    arguments = [x, w.tensor.raw, np.zeros((len(x), n), np.float32), len(x), n, x.shape[1]]
    align = {f"weights_{fmt.name.lower()}": fmt.block_bytes if fmt.float_type else 2}
    (y,) = compile_host(source.text, source.symbol).run(
        grid, block_size, arguments, alignments=align, **options
    )
    assert_contract(y, x, w)


# --- classes of M ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_the_classes_of_m_cover_every_m(arch: str) -> None:
    classes = m_classes(find_target(f"hip:{arch}"), PlanOptions())
    assert classes == ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))


# --- the header -----------------------------------------------------------------------------------

PROGRAM = """
#include <stdio.h>
#include "q4jit_kernels.h"
#include "q4jit_kernels.h"
int main(void) {
    for (int i = 0; i < Q4JIT_PRODUCT_COUNT; ++i)
        for (int j = 0; j < q4jit_products[i].launch_count; ++j) {
            const struct q4jit_product *p = &q4jit_products[i];
            const struct q4jit_launch *l = &p->launches[j];
            printf("%s %s %u %u %u %u %d %d\\n", l->file, l->symbol, l->block_size, l->grid_x,
                   l->rows_per_block, l->static_lds_bytes, p->weight_alignment_bytes,
                   p->requires_finite_scales);
        }
    return Q4JIT_Q4_0_K64_N37_F32_PLANAR_M1_GFX1100;
}
"""


@pytest.mark.parametrize(
    ("compiler", "options"),
    [("gcc", ["-std=c99", "-x", "c"]), ("g++", ["-std=c++11", "-x", "c++"])],
)
def test_the_header_agrees_with_the_manifest_in_c_and_c_plus_plus(
    built: tuple[Path, dict[str, Any]], compiler: str, options: list[str], tmp_path: Path
) -> None:
    out, manifest = built
    (tmp_path / "main.c").write_text(PROGRAM)
    strict = ["-Wall", "-Wextra", "-pedantic", "-Werror", "-I", str(out)]
    command = [require_tool(compiler, compiler), *options, *strict, str(tmp_path / "main.c")]
    subprocess.run([*command, "-o", str(tmp_path / "main")], check=True)
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == [
        [
            *(launch["code_object"], launch["symbol"], str(launch["block_size"])),
            *map(str, (launch["grid"]["x"], launch["grid"]["rows_per_block"])),
            str(launch["static_lds_bytes"]),
            *map(
                str, (product["weight"]["alignment_bytes"], int(product["requires_finite_scales"]))
            ),
        ]
        for product in manifest["products"]
        for launch in product["launches"]
    ]


def test_weights_whose_scales_may_be_infinite(tmp_path: Path) -> None:
    """They get a product of their own, which the manifest and the header mark."""
    weights = {WeightSpec("Q4_0", K, N, finite): () for finite in (True, False)}
    request = BuildRequest(weights, (find_target("hip:gfx1100"),), rows=(1,))
    products = build_request(request, tmp_path)["products"]
    assert [product["requires_finite_scales"] for product in products] == [True, False]
    header = (tmp_path / "q4jit_kernels.h").read_text("utf-8")
    assert re.findall(r"1536, 16, ([01]),$", header, re.MULTILINE) == ["1", "0"]
    assert "int requires_finite_scales;" in header


def test_the_example_compiles_and_reports_errors(
    built: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    require_tool("hipcc", "hipcc libamdhip64-dev")
    for name in ("main.cpp", "Makefile"):
        (tmp_path / name).write_bytes((ROOT / "examples" / "embed_hsaco" / name).read_bytes())
    make = [require_tool("make", "make"), f"KERNELS={built[0]}", "CXXFLAGS=-Wall -Wextra -Werror"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "w.bin").write_bytes(weight("Q4_0", K, N).tensor._resident.blocks(PLANAR).tobytes())
    program, kind = str(tmp_path / "embed_hsaco"), ("Q4_0", PLANAR, "f32")
    hidden = os.environ | {"HIP_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": "-1"}
    for arguments, message in (
        (["w.bin", *kind, str(K), str(N), "1"], "hipInit (is there an AMD GPU"),
        (["w.bin", *kind, str(K), str(N), "x"], "usage: "),
        (["none.bin", *kind, str(K), str(N), "1"], "cannot open none.bin"),
    ):
        done = subprocess.run(
            [program, str(built[0]), *arguments],
            cwd=tmp_path,
            env=hidden,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"embed_hsaco: {message}")
        assert len(done.stderr.splitlines()) == 1
