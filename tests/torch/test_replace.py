"""`replace_linears`."""

import copy
import gc
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from q4jit import ArgumentError, FormatError
from q4jit.torch import Embedding, Linear, Weight, replace_linears
from q4jit.torch.report import Report

pytestmark = pytest.mark.torch

K, N, WORDS = 256, 64, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(K, N)
        self.down = nn.Linear(N, K, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Model(nn.Module):
    """Two blocks, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, K)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(K, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


def resident_layouts(weight: Weight) -> set[str]:
    """Return the layouts of the copies that kernels read, the weight's own blocks among them."""
    resident = weight.tensor()._resident
    assert resident.addresses[weight.layout] == weight.blocks.data_ptr()
    return {*resident.addresses, *resident._copies}


def model() -> Any:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def names(entries: Any) -> list[str]:
    return [entry.name for entry in entries]


def reasons(report: Report) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.skipped}


# --- what is replaced -----------------------------------------------------------------------------


def test_layers_are_replaced_in_place() -> None:
    m = model()
    before, bias = copy.deepcopy(m), m.blocks[0].up.bias
    report = replace_linears(m, "Q8_0", skip=["head"])
    linears = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
    assert names(report.replaced) == linears
    assert {type(m.get_submodule(name)) for name in linears} == {Linear}
    assert type(m.head) is nn.Linear
    assert m.blocks[0].up.bias is bias
    assert m.blocks[0].down.bias is None
    ids = torch.arange(7)
    torch.testing.assert_close(m(ids), before(ids), rtol=0, atol=0.3)
    expected = Linear.from_linear(before.blocks[1].down, "Q8_0")
    assert torch.equal(m.blocks[1].down(torch.ones(N)), expected(torch.ones(N)))


def test_the_report() -> None:
    m = model()
    report = replace_linears(m, "Q4_K")
    assert report.replaced[0].__dict__ == {
        "name": "blocks.0.up",
        "format": "Q4_K",
        "K": K,
        "N": N,
        "bytes_before": 4 * K * N,
        "bytes_after": m.blocks[0].up.weight.blocks.nbytes,
        "shares": "",
    }
    assert (report.bytes_before, report.bytes_after) == (
        8 * K * N,
        sum(block.up.weight.nbytes for block in m.blocks),
    )
    assert reasons(report) == {
        "blocks.0.down": "K = 64 is not a whole number of blocks of Q4_K, 256 each; "
        'give fallback="Q8_0", for example',
        "blocks.1.down": reasons(report)["blocks.0.down"],
        "head": 'embed.weight is the same weight; give embeddings="Q8_0", for example',
    }
    table = str(report).splitlines()
    assert table[0].split() == ["module", "format", "K", "N", "before", "after"]
    assert table[1].split() == "blocks.0.up Q4_K 256 64 0.06 MiB 0.01 MiB".split()
    assert table[3].split() == "2 replaced 0.12 MiB 0.02 MiB".split()
    assert table[5].startswith("skipped blocks.0.down  K = 64 is not")


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    replace_linears(model(), "Q8_0")
    assert "replacing layers 1 of 4" in capsys.readouterr().err


def test_a_fallback_for_other_widths() -> None:
    report = replace_linears(model(), "Q4_K", fallback="Q5_0")
    assert [entry.format for entry in report.replaced] == ["Q4_K", "Q5_0"] * 2
    m = model()
    m.blocks[0].down = nn.Linear(30, K).requires_grad_(False)
    reason = reasons(replace_linears(m, "Q4_K", fallback="Q5_0"))["blocks.0.down"]
    blocks = "K = 30 is not a whole number of blocks of Q5_0, 32 each"
    assert reason == f'{blocks}; give fallback="F16", for example'


def test_the_mode_is_kept() -> None:
    m = model()
    m.eval()
    m.blocks[1].train()
    replace_linears(m, "Q8_0")
    assert [block.up.training for block in m.blocks] == [False, True]


def test_float_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    floats = [weakref.ref(layer.weight) for block in m.blocks for layer in (block.up, block.down)]
    alive = []

    class Progress:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> None:
            gc.collect()
            alive.append(sum(weight() is not None for weight in floats))

    monkeypatch.setattr(sys, "stderr", Progress())
    replace_linears(m, "Q8_0", skip=["head"])
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize("skip", [["blocks.1"], ("blocks.1.*",), {"*.1.up", "blocks.1.down"}])
def test_skipped_names(skip: Any) -> None:
    report = replace_linears(model(), "Q8_0", skip=skip)
    assert names(report.replaced) == ["blocks.0.up", "blocks.0.down"]
    assert reasons(report)["blocks.1.up"].startswith("skip='")


# --- tied weights ---------------------------------------------------------------------------------


def test_tied_layers_share_a_weight() -> None:
    m = model()
    m.blocks[1].up.weight = m.blocks[0].up.weight
    report = replace_linears(m, "Q8_0", skip=["head"])
    assert m.blocks[0].up.weight is m.blocks[1].up.weight
    shared = next(entry for entry in report.replaced if entry.name == "blocks.1.up")
    assert shared.shares == "blocks.0.up"
    assert report.bytes_before == 3 * 4 * K * N
    assert "the weight of blocks.0.up" in str(report)


def test_a_module_in_two_places_stays_one() -> None:
    m = model()
    m.again = m.blocks[0]
    m.last = m.blocks[1].up
    replace_linears(m, "Q8_0")
    assert m.again.up is m.blocks[0].up
    assert type(m.last) is Linear
    assert m.last is m.blocks[1].up


def test_a_tied_layer_is_skipped_with_the_other() -> None:
    m = model()
    m.blocks[1].up.weight = m.blocks[0].up.weight
    report = replace_linears(m, "Q8_0", skip=["blocks.0.up"])
    reason = "blocks.0.up, which is skipped, has the same weight"
    assert reasons(report)["blocks.1.up"] == reason


def test_a_tied_embedding() -> None:
    m = model()
    before, ids = copy.deepcopy(m), torch.arange(7)
    report = replace_linears(m, "Q4_K", fallback="Q8_0", embeddings="Q6_K")
    assert (type(m.embed), type(m.head)) == (Embedding, Linear)
    formats = {entry.name: entry.format for entry in report.replaced}
    assert (formats["embed"], formats["head"]) == ("Q6_K", "Q6_K")
    assert report.bytes_before == 4 * (WORDS * K + 4 * K * N)
    vectors = m.embed(torch.arange(WORDS))
    torch.testing.assert_close(m.head(torch.eye(K)), vectors.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(m(ids), before(ids), rtol=0, atol=4)


def test_a_tied_head_and_its_embedding_have_one_copy() -> None:
    m = model()
    report = replace_linears(m, "Q4_K", fallback="Q8_0", embeddings="Q6_K")
    weight = m.embed.weight
    assert weight is m.head.weight
    assert [(e.name, e.shares) for e in report.replaced if e.shares] == [("head", "embed")]
    ups = [linear.weight for block in m.blocks for linear in (block.up, block.down)]
    assert report.bytes_after == weight.nbytes + sum(up.nbytes for up in ups)
    m(torch.arange(7))
    assert resident_layouts(weight) == {weight.layout}


# --- other devices and dtypes ---------------------------------------------------------------------


def test_a_model_on_meta_gets_the_state_of_another() -> None:
    options: Any = {"fallback": "Q8_0", "embeddings": "Q6_K"}
    m = model()
    replace_linears(m, "Q4_K", **options)
    with torch.device("meta"):
        new: Any = Model().requires_grad_(False)
    replace_linears(new, "Q4_K", **options)
    new.load_state_dict(m.state_dict(), assign=True)
    assert torch.equal(new(torch.arange(7)), m(torch.arange(7)))


def test_a_model_in_bfloat16() -> None:
    m = model().bfloat16()
    replace_linears(m, "Q8_0", embeddings="Q8_0")
    assert m(torch.arange(7)).dtype == torch.bfloat16


def test_a_replaced_model_is_replaced_once() -> None:
    m = model()
    replace_linears(m, "Q8_0", embeddings="Q8_0")
    report = replace_linears(m, "Q8_0", embeddings="Q8_0")
    assert (report.replaced, report.skipped) == ((), ())


# --- what is skipped ------------------------------------------------------------------------------


def hooked() -> nn.Module:
    layer = nn.Linear(K, N)
    layer.register_forward_hook(lambda *_: None)
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(K, N)
    vars(layer)["forward"] = layer.forward
    return layer


class Distributed(torch.Tensor):
    """A tensor whose memory does not hold all of its values."""


def distributed() -> nn.Module:
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Distributed))
    return layer


def tied_to_a_parameter() -> nn.Module:
    layer = nn.Linear(K, N)
    owner: Any = nn.Module()
    owner.table = layer.weight
    return nn.ModuleDict({"layer": layer, "owner": owner})


SKIPPED = [
    (hooked, "it has hooks, which its replacement would not have"),
    (patched, "it has hooks, which its replacement would not have"),
    (lambda: weight_norm(nn.Linear(K, N)), "it is a ParametrizedLinear, a subclass of nn.Linear"),
    (lambda: nn.LazyLinear(N), "it is a LazyLinear, a subclass of nn.Linear"),
    (lambda: nn.Linear(K, N, dtype=torch.complex64), "its weight is a Parameter in complex64"),
    (distributed, "its weight is a Distributed in float32"),
    (lambda: nn.Embedding(N, K, max_norm=1.0), "it has max_norm, which changes its weight"),
    (tied_to_a_parameter, "x.owner.table is the same weight"),
    (
        lambda: nn.TransformerEncoderLayer(64, 2, 64),
        "nn.TransformerEncoderLayer reads its weight without calling it",
    ),
    (
        lambda: nn.MultiheadAttention(64, 2),
        "it is a NonDynamicallyQuantizableLinear, a subclass of nn.Linear",
    ),
]


@pytest.mark.parametrize(("make", "reason"), SKIPPED)
def test_layers_that_are_skipped(make: Callable[[], nn.Module], reason: str) -> None:
    m = nn.ModuleDict({"x": make()})
    with torch.no_grad():
        report = replace_linears(m, "Q8_0", embeddings="Q8_0")
    assert not report.replaced
    assert reason in reasons(report).values()
    assert not any(isinstance(module, Linear | Embedding) for module in m.modules())


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"skip": ["blocks.2"]},
            r"skip: expected a name .*, got 'blocks.2'; the layers are named 'b",
        ),
        ({"skip": "head"}, r"skip: expected a list of names and patterns, got 'head'"),
        ({"skip": [1]}, r"skip: expected a name or pattern, got 1"),
        ({"format": "Q4_9"}, r"unknown format 'Q4_9'"),
        ({"format": "Q2_K"}, r"cannot quantise to Q2_K, only to"),
        ({"fallback": "Q3_K"}, r"cannot quantise to Q3_K, only to"),
        ({"precision": "f8"}, r"precision: expected 'f32' or 'f16' or 'i8', got 'f8'"),
        (
            {"model": nn.Linear(K, N)},
            r"expected a module that contains layers, got Linear; use Line",
        ),
        ({"model": "model"}, r"expected a module that contains layers, got str"),
    ],
)
def test_refused_arguments(options: Any, message: str) -> None:
    m = model()
    with pytest.raises((ArgumentError, FormatError), match=message):
        replace_linears(**{"model": m, "format": "Q8_0", **options})
    assert not any(isinstance(module, Linear) for module in m.modules())


def test_weights_that_require_gradients() -> None:
    m = model()
    m.blocks[1].down.requires_grad_(True)
    message = (
        "blocks.1.down.weight: expected a weight without gradient, got one that requires a "
        "gradient; use model.requires_grad_(False), or call under torch.no_grad()"
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        replace_linears(m, "Q8_0")
    assert type(m.blocks[0].up) is nn.Linear
    with torch.no_grad():
        replace_linears(m, "Q8_0")
    assert type(m.blocks[1].down) is Linear


def test_values_beyond_the_range_name_the_layer() -> None:
    m = model()
    m.blocks[1].down.weight[0, 0] = 1e30
    with pytest.raises(FormatError, match=r"blocks.1.down.weight: .*within float16's range"):
        replace_linears(m, "Q8_0")
