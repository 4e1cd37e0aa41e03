"""`fuse`: a fused model computes what the model does."""

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from q4jit import ArgumentError
from q4jit.torch import fuse, unfuse
from q4jit.torch.fusion.attention import one_query, turns_of
from tests.support import child
from tests.support.paths import ROOT
from tests.support.torch.decoders import DECODERS, decoder, error, pair

BOUND: Final = 2e-5
CONTEXT: Final = 16


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answer a question of transformers' that crashes PyTorch with `tests.support.without_cuda`."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.no_grad():
        yield


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def reasons(report: Any) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.skipped}


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
def test_a_fused_model_computes_what_the_model_does(kind: str) -> None:
    model, fused = pair(kind)
    report = fuse(fused)
    moe = kind.endswith("_moe")
    assert [(e.attention, e.feed_forward) for e in report.fused] == [(True, not moe), (True, True)]
    assert reasons(report).keys() == ({"model.layers.0.mlp"} if moe else set())
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    assert error(fused(ids).logits, model(ids).logits) < BOUND
    padded = fused(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    assert error(padded[0][0, 3:], padded[1][0, 3:]) < BOUND
    assert error(padded[0][1], padded[1][1]) < BOUND


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_decoding_with_a_cache(kind: str, is_static: bool) -> None:
    model, fused = pair(kind)
    fuse(fused)
    caches = [
        StaticCache(config=m.config, max_cache_len=CONTEXT)
        if is_static
        else DynamicCache(config=m.config)
        for m in (fused, model)
    ]
    for i, length in enumerate((6, 1, 1, 3, 1)):
        ids = tokens(2, length, seed=i)
        logits = [
            m(ids, cache=cache).logits for m, cache in zip((fused, model), caches, strict=True)
        ]
        assert error(*logits) < BOUND, i


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_as_exact_as_those_of_the_model(kind: str, dtype: torch.dtype) -> None:
    model, ids = decoder(kind), tokens(2, 9)
    exact = model(ids).logits
    model = model.to(dtype)
    fused = copy.deepcopy(model)
    fuse(fused)
    logits = fused(ids).logits
    assert logits.dtype is model(ids).logits.dtype
    assert error(logits, exact) < 1.1 * error(model(ids).logits, exact)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_norms_of_another_type_promote_as_those_of_the_model(kind: str) -> None:
    model, fused = (m.to(torch.bfloat16) for m in pair(kind))
    for m in (model, fused):
        for layer in m.model.layers:
            layer.input_layernorm.float()
            layer.post_attention_layernorm.float()
    fuse(fused)
    x = model.model.embed_tokens(tokens(2, 3))
    turns = model.model.rotary_emb(x, torch.arange(3)[None], *["full_attention"][: kind != "llama"])
    made, whole = (m.model.layers[0](x, position_embeddings=turns) for m in (fused, model))
    assert made.dtype is whole.dtype
    assert error(made, whole) < 2e-2


@pytest.mark.parametrize("decoding", ["auto", "matmul", "sum", "model"])
def test_ways_of_decoding_agree(decoding: str) -> None:
    model, fused = pair("llama")
    fuse(fused, decoding=decoding)
    step = torch.compile(fused, fullgraph=True) if decoding == "sum" else fused
    caches = [StaticCache(config=m.config, max_cache_len=CONTEXT) for m in (fused, model)]
    for m, cache in zip((fused, model), caches, strict=True):
        m(tokens(2, 6), cache=cache)
    for i in range(3):
        ids = tokens(2, 1, seed=i)
        assert error(step(ids, cache=caches[0]).logits, model(ids, cache=caches[1]).logits) < BOUND


def test_scores_of_float16_do_not_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(1, heads, length, 128, generator=generator)
        for heads, length in ((4, 1), (2, 9), (2, 9))
    )
    keys[:, :, 0] = query[:, ::2, 0]
    query, keys = 40 * query, 40 * keys  # up to 128 · 40² without a scale
    scaling = 128**-0.5
    exact = one_query(query, keys, values, None, scaling, "matmul")
    halves = one_query(query.half(), keys.half(), values.half(), None, scaling, "matmul")
    assert error(halves, exact) < 2e-3


@pytest.mark.parametrize("heads", [1, 4], ids=["of all heads", "of each head"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_masks_of_one_query(heads: int, additive: bool) -> None:
    model, fused = pair("llama")
    fuse(fused, decoding="matmul")
    mask = torch.rand(2, heads, 1, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., -1] = True
    given = torch.zeros(mask.shape).masked_fill(~mask, -1e9) if additive else mask
    logits = []
    for m in (fused, model):
        cache = DynamicCache(config=m.config)
        m(tokens(2, 4), cache=cache)
        logits.append(m(tokens(2, 1), cache=cache, attention_mask=given).logits)
    assert error(*logits) < BOUND


@pytest.mark.parametrize("length", [5, 1])
def test_dropout_in_training_is_that_of_the_model(length: int) -> None:
    model, fused = pair("llama", attention_dropout=0.5)
    fuse(fused, decoding="matmul")
    ids, logits = tokens(2, length), []
    for m in (fused, model):
        m.train()
        torch.manual_seed(0)
        logits.append(m(ids).logits)
    assert error(*logits) < BOUND
    assert error(logits[0], model.eval()(ids).logits) > BOUND


# --- what transformers offers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_hidden_states_and_attentions_are_captured(kind: str) -> None:
    model, fused = pair(kind, attn_implementation="eager")
    model(tokens(1, 3), output_attentions=True)  # hooks that are there before do no harm
    fuse(fused)
    ids = tokens(2, 7)
    made, whole = (
        m(ids, output_hidden_states=True, output_attentions=True) for m in (fused, model)
    )
    assert len(made.hidden_states) == len(whole.hidden_states) == 3
    assert len(made.attentions) == len(whole.attentions) == 2
    for a, b in zip(
        made.hidden_states + made.attentions, whole.hidden_states + whole.attentions, strict=True
    ):
        assert a.shape == b.shape
        assert error(a, b) < BOUND


def test_captured_layers_can_be_fused() -> None:
    model = decoder("llama", attn_implementation="eager")
    whole = model(tokens(1, 5), output_attentions=True).attentions
    assert len(fuse(model).fused) == 2
    made = model(tokens(1, 5), output_attentions=True).attentions
    assert error(made[1], whole[1]) < BOUND


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generate_gives_the_same_text(options: dict[str, Any]) -> None:
    model, fused = pair("qwen3")
    fuse(fused)
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    texts = [
        m.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            disable_compile=True,
            **options,
        )
        for m in (fused, model)
    ]
    assert torch.equal(*texts)


def test_gradients_are_those_of_the_model() -> None:
    model, fused = pair("gemma3_text")
    fuse(fused)
    gradients = []
    with torch.enable_grad():
        for m in (fused, model):
            m.get_parameter("model.layers.0.post_feedforward_layernorm.weight").requires_grad_()
            m.get_parameter("model.layers.1.input_layernorm.weight").requires_grad_()
            x = m.model.embed_tokens(tokens(2, 5)).detach().requires_grad_()
            m(inputs_embeds=x).logits.square().mean().backward()
            gradients.append([x.grad, *(p.grad for p in m.parameters() if p.requires_grad)])
    for made, whole in zip(*gradients, strict=True):
        assert error(made, whole) < 1e-4


def test_turns_that_are_kept_do_not_lose_gradients() -> None:
    cos, sin = (torch.ones(1, 3, 8, requires_grad=True) for _ in range(2))
    assert not turns_of((cos, sin))[1].requires_grad  # without gradients
    with torch.enable_grad():
        assert turns_of((cos, sin))[1].requires_grad


def test_turns_of_embeddings_that_were_written_to() -> None:
    cos, sin = torch.ones(1, 3, 8), torch.ones(1, 3, 8)
    kept = turns_of((cos, sin))
    assert turns_of((cos, sin)) is kept
    for written in (cos, sin):
        written.mul_(2)
        kept = turns_of((cos, sin))
        assert kept[0].unique().tolist() == [2]
    assert kept[1].unique().tolist() == [-2, 2]


def test_gradient_checkpointing() -> None:
    model, fused = pair("llama")
    fuse(fused)
    gradients = []
    with torch.enable_grad():
        for m in (fused, model):
            m.train()
            m.activation_checkpointing_enable()
            x = m.model.embed_tokens(tokens(2, 5)).detach().requires_grad_()
            m(inputs_embeds=x).logits.square().mean().backward()
            gradients.append(x.grad)
    assert error(*gradients) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_compiled_step_is_one_graph_for_all_steps(kind: str) -> None:
    model, fused = pair(kind)
    fuse(fused)
    step: Any = torch.compile(fused, fullgraph=True, mode="reduce-overhead")
    caches = [StaticCache(config=m.config, max_cache_len=CONTEXT) for m in (fused, model)]
    for m, cache in zip((fused, model), caches, strict=True):
        m(tokens(1, 6), cache=cache)
    counters.clear()
    for i in range(3):
        ids = tokens(1, 1, seed=i)
        made, whole = step(ids, cache=caches[0]), model(ids, cache=caches[1])
        assert error(made.logits, whole.logits) < BOUND
    # the cache of sliding layers counts in Python, which makes a second graph
    assert counters["stats"]["unique_graphs"] == 1 + (kind != "llama")


# --- modules --------------------------------------------------------------------------------------


def test_names_states_and_copies_are_those_of_the_model() -> None:
    model, fused = pair("qwen3")
    fuse(fused)
    own, ids = type(model.model.layers[0]), tokens(1, 4)
    assert isinstance(fused.model.layers[0], own)
    assert [name for name, _ in fused.named_modules()] == [
        name for name, _ in model.named_modules()
    ]
    assert fused.state_dict().keys() == model.state_dict().keys()
    expected = fused(ids).logits
    for same in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(same(ids).logits, expected)
        assert fuse(same).fused == ()  # it is already
    other = decoder("qwen3")
    other.get_parameter("model.norm.weight").fill_(7.0)
    fuse(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, expected)
    unfuse(fused)
    assert type(fused.model.layers[0]) is own
    assert torch.equal(fused(ids).logits, model(ids).logits)


class Silent(nn.Module):
    """A feed-forward with the same layers, and another result."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("input_layernorm", False),
        ("self_attn", False),
        ("self_attn.q_proj", False),
        ("mlp", False),
        ("mlp", True),
        ("mlp.act_fn", False),
    ],
)
def test_a_module_replaced_after_fusing_is_refused(name: str, compiled: bool) -> None:
    model = decoder("llama")
    fuse(model)
    parent, _, own = f"model.layers.1.{name}".rpartition(".")
    old, ids = model.get_submodule(f"{parent}.{own}"), tokens(1, 3)
    run: Any = torch.compile(model, backend="eager") if compiled else model
    run(ids)
    new = Silent(old) if name == "mlp" else nn.Sequential(old)  # as adapters do
    setattr(model.get_submodule(parent), own, new)
    # the compiler has an error of its own, which says the same
    kind = InternalTorchDynamoError if compiled else ArgumentError
    with pytest.raises(kind, match=rf"{own} of model.layers.1: .*unfuse\(model\)"):
        run(ids)
    setattr(model.get_submodule(parent), own, old)
    run(ids)


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_proj", "mlp", "mlp.act_fn"])
def test_a_hook_or_forward_after_fusing_is_refused(name: str) -> None:
    model = decoder("llama")
    fuse(model)
    module, ids = model.get_submodule(f"model.layers.0.{name}"), tokens(1, 3)
    refused = rf"{name.rpartition('.')[2]} of model\.layers\.0"
    for add in (module.register_forward_hook, module.register_forward_pre_hook):
        hook = add(lambda *_: None)
        with pytest.raises(ArgumentError, match=refused):
            model(ids)
        hook.remove()
    module.forward = module.forward
    with pytest.raises(ArgumentError, match=refused):
        model(ids)
    del module.forward
    model(ids)


# --- what stays as it was -------------------------------------------------------------------------


def changed(model: Any, what: str) -> None:
    layer = model.model.layers[0]
    if what == "hooks":
        layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    elif what == "hooks of the activation":
        layer.mlp.act_fn.register_forward_hook(lambda *_: None)
    elif what == "forward":
        layer.forward = layer.forward
    elif what == "subclass":
        layer.__class__ = type("OwnDecoderLayer", (type(layer),), {"__module__": "own"})
    elif what == "linear":
        layer.self_attn.v_proj = nn.Linear(64, 64)
    elif what == "precision":
        layer.mlp.gate_proj.precision = "f16"
    elif what == "precision of a half":
        for linear in layer.mlp.children():
            linear.precision = "f16"
    elif what == "norm":
        layer.input_layernorm = nn.RMSNorm(64)
    elif what == "eps":
        layer.input_layernorm.variance_epsilon = 0.5
    else:
        layer.mlp.act_fn = nn.Tanh()


@pytest.mark.parametrize(
    ("what", "name", "reason"),
    [
        ("hooks", ".mlp", "up_proj has hooks"),
        ("hooks of the activation", ".mlp", "its activation has hooks"),
        ("forward", "", "its forward was replaced"),
        ("subclass", "", "OwnDecoderLayer is no decoder layer that is known"),
        ("linear", ".self_attn", "v_proj is a Linear of torch.nn, no Linear of q4jit"),
        ("precision", ".mlp", "its layers have different precisions: f16, f32"),
        ("precision of a half", ".mlp", "its precision is f16, and that of o_proj is f32"),
        ("norm", "", "input_layernorm is a RMSNorm, an unknown norm"),
        ("eps", "", "its norms differ in eps"),
        ("activation", ".mlp", "Tanh is an unknown activation"),
    ],
)
def test_what_is_not_known_stays_and_is_reported(what: str, name: str, reason: str) -> None:
    model = decoder("llama", attention_bias=False, mlp_bias=False)
    changed(model, what)
    fused, ids = copy.deepcopy(model) if what != "forward" else model, tokens(2, 6)
    expected = model(ids).logits
    report = fuse(fused)
    assert reasons(report) == {f"model.layers.0{name}": reason}
    assert report.fused[-1].name == "model.layers.1"
    assert len(report.fused) == (2 if name else 1)
    assert f"skipped model.layers.0{name}  {reason}" in str(report)
    assert error(fused(ids).logits, expected) < BOUND


def test_a_model_without_decoder_layers() -> None:
    with pytest.raises(ArgumentError, match="with decoder layers, got Sequential"):
        fuse(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ArgumentError, match="a model of transformers, got list"):
        fuse([])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="decoding of fuse"):
        fuse(nn.Sequential(), decoding="fast")


def test_a_model_that_is_fused() -> None:
    model = decoder("llama")
    assert len(fuse(model).fused) == 2
    report = fuse(model)
    assert not report.fused
    assert reasons(report) == dict.fromkeys(
        ["model.layers.0", "model.layers.1"], "it is fused already"
    )


# --- the example ----------------------------------------------------------------------------------


def test_the_example_measures_a_random_model() -> None:
    run = [sys.executable, str(ROOT / "examples" / "model_speed.py"), "--random=tiny", "--unfused"]
    sizes = ["--fused", "--prompt=8", "--tokens=6", "--context=32", "--turns=1"]
    done = subprocess.run(
        [*run, *sizes],
        env=child.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"relative error \d\.\de-0[678] to the unfused", done.stdout)
    assert re.findall(r"^eager +(\w+) +float32 +[\d.]+", done.stdout, re.MULTILINE) == [
        "unfused",
        "fused",
    ]
