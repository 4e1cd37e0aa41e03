"""`install`: transformers' own loader keeps Qwen3.5, its MoE and LFM2 packed."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GgufConfig
from transformers.integrations import hub_kernels
from transformers.integrations.gguf import dequant, kernels
from transformers.integrations.gguf.utils import GgufEmbedding, GgufExperts, GgufLinear
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from q4jit.errors import ArgumentError, DeviceError, GGUFError
from q4jit.torch import Embedding, Experts, Linear, Weight
from q4jit.transformers import install, installation, uninstall
from q4jit.transformers.packed import ReorderedLinear, replace_packed
from tests.support.torch.equal import Graphs
from tests.support.torch.hybrid_models import ARCHITECTURES, VOCABULARY, write
from tests.support.torch.tiny import files as tiny
from tests.support.torch.tiny.architectures import RECIPES

Model = Any
PROMPTS = (1, 5, 33)
BF16 = torch.bfloat16
PACKED = (GgufLinear, GgufExperts, GgufEmbedding)


@pytest.fixture
def installed() -> Iterator[None]:
    install()
    yield
    uninstall()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `lfm2.gguf`, `lfm2-tied.gguf`, and so on."""
    folder = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        write(folder / f"{architecture}.gguf", architecture)
        write(folder / f"{architecture}-tied.gguf", architecture, tied=True)
    return folder


def load(folder: Path, name: str, **options: Any) -> Model:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{name}.gguf", **options)


def load_floats(folder: Path, name: str, **options: Any) -> Model:
    """Load a model as transformers unpacks it."""
    return load(folder, name, quantization_config=GgufConfig(dequantize=True), **options)


def prompt(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (1, length), generator=generator)


@torch.no_grad()
def logits(model: Model, length: int) -> Tensor:
    made: Tensor = model(prompt(length)).logits
    return made


def generated(model: Model) -> list[int]:
    tokens = model.generate(prompt(5), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return list(tokens[0].tolist())


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made.double() - wanted.double()).norm() / wanted.double().norm())


of_each_file = pytest.mark.parametrize(
    "name", [f"{name}{suffix}" for name in ARCHITECTURES for suffix in ("", "-tied")]
)


@of_each_file
def test_a_model_gives_the_results_of_the_dequantised_one(
    name: str, folder: Path, installed: None
) -> None:
    model, floats = load(folder, name), load_floats(folder, name)
    for length in PROMPTS:
        assert error(logits(model, length), logits(floats, length)) < 1e-5
    assert generated(model) == generated(floats)


def test_a_model_in_bfloat16(folder: Path, installed: None) -> None:
    exact = load_floats(folder, "qwen35-tied")
    model, floats = (read(folder, "qwen35-tied", dtype=BF16) for read in (load, load_floats))
    made, wanted = logits(model, 33), logits(exact, 33)
    assert made.dtype is BF16
    assert error(made, wanted) < 1.2 * error(logits(floats, 33), wanted) < 0.05


@of_each_file
def test_modules_are_replaced(name: str, folder: Path, installed: None) -> None:
    model = load(folder, name)
    kinds = [type(module) for module in model.modules()]
    assert not set(PACKED) & set(kinds)
    assert kinds.count(Embedding) == 1
    assert kinds.count(Experts) == (2 if name.startswith("qwen35moe") else 0)
    assert kinds.count(ReorderedLinear) == (0 if name.startswith("lfm2") else 1)
    # the projections that the file has in F32 stay what they are
    floats = [key for key, module in model.named_modules() if type(module) is nn.Linear]
    wanted = {"lfm2": [], "qwen35": ["in_proj_b"]}.get(
        name.partition("-")[0], ["in_proj_b", "shared_expert_gate", "shared_expert_gate"]
    )
    assert [key.rpartition(".")[2] for key in floats] == wanted
    assert isinstance(model.lm_head, Linear)
    assert model.get_input_embeddings().weight.lookup != name.endswith("-tied")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == name.endswith("-tied")


@of_each_file
def test_each_weight_is_held_once(name: str, folder: Path, installed: None) -> None:
    model = load(folder, name)
    gc.collect()
    left = [
        tuple(tensor.shape)
        for tensor in gc.get_objects()
        if type(tensor) is nn.Parameter and tensor.dtype is torch.uint8
    ]
    assert left == []
    file = (folder / f"{name}.gguf").stat().st_size
    blocks = sum(module.nbytes for module in model.modules() if isinstance(module, Weight))
    assert 0.85 * file < blocks < 1.1 * file
    assert model.get_memory_footprint() < 1.1 * file


@pytest.mark.parametrize("name", ["lfm2-tied", "qwen35moe"])
def test_a_model_compiles_without_breaks(name: str, folder: Path, installed: None) -> None:
    model, graphs = load(folder, name), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    wanted = logits(model, 5)
    with torch.no_grad():
        made = compiled(prompt(5), use_cache=False).logits
    assert torch.equal(made, wanted)
    assert graphs.count == 1
    assert graphs.calls > 8


def test_nothing_is_asked_of_the_hub(
    folder: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for owner, name in (
        (hub_kernels, "get_kernel"),
        (kernels, "is_kernels_available"),
        (PreTrainedModel, "set_attn_implementation"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: asked.append(name))
    load(folder, "lfm2")
    assert asked == []


def test_other_architectures_load_as_before(installed: None, tmp_path: Path) -> None:
    made = tiny.write(RECIPES["llama"](), tmp_path / "llama.gguf")
    model = load(tmp_path, "llama")
    assert not any(isinstance(module, Weight) for module in model.modules())
    assert torch.equal(logits(model, 5), logits(made.reference, 5))


def test_tied_weights_stay_tied(folder: Path, installed: None) -> None:
    model = load(folder, "lfm2-tied")
    wanted = logits(model, 5)
    model.tie_weights()  # what libraries for adapters call
    assert torch.equal(logits(model, 5), wanted)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_model_can_be_moved_and_saved(folder: Path, installed: None, tmp_path: Path) -> None:
    model = load(folder, "qwen35")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = load(folder, "qwen35")
    for module in other.modules():
        if isinstance(module, Weight):
            module.blocks.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(other, 5), logits(model, 5))
    assert logits(model.to(BF16), 5).dtype is BF16


# --- installing -----------------------------------------------------------------------------------


def state() -> list[object]:
    names = (
        "_process_model_before_weight_loading",
        "_process_model_after_weight_loading",
    )
    return [
        kernels._gguf_kernel,
        kernels.kernelize_ggml_layers,
        *(getattr(GgufHfQuantizer, name) for name in names),
        *(list(table) for table in (dequant.GGML_BLOCK, dequant.GGML_NAME, dequant._DEQUANT)),
    ]


def test_uninstall_undoes_everything() -> None:
    before = state()
    install()
    changed = state()
    assert all(old != new for old, new in zip(before, changed, strict=True))
    install()
    assert state() == changed
    uninstall()
    assert state() == before
    uninstall()
    assert state() == before


def test_overlapping_blocks_undo_nothing_of_each_other() -> None:
    """Two threads load models with `from_gguf`, and the first to begin ends first."""
    before, first, second = state(), installation.installed(), installation.installed()
    first.__enter__()
    changed = state()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state() == changed
    install()  # by the user, meanwhile
    second.__exit__(None, None, None)
    assert state() == changed
    uninstall()
    assert state() == before


def test_a_model_loaded_before_is_replaced(
    folder: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("q4jit.transformers.hooks.replace_packed", lambda _: [])
        model = load(folder, "qwen35moe-tied")
    assert {type(module) for module in model.modules()} >= set(PACKED)
    names = replace_packed(model)
    assert {"model.embed_tokens", "model.layers.0.mlp.experts", "lm_head"} <= set(names)
    assert not {type(module) for module in model.modules()} & set(PACKED)
    assert torch.equal(logits(model, 5), logits(load(folder, "qwen35moe-tied"), 5))
    assert replace_packed(model) == []


def test_packed_modules_of_transformers_run_with_the_kernel(
    folder: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("q4jit.transformers.hooks.replace_packed", lambda _: [])
    model, floats = load(folder, "qwen35moe"), load_floats(folder, "qwen35moe")
    assert {type(module) for module in model.modules()} >= set(PACKED)
    for length in (5, 33):  # products, and weights unpacked by transformers
        assert error(logits(model, length), logits(floats, length)) < 1e-5


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def unread(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a file's weights are read."""

    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(GgufHfQuantizer, "get_state_dict", read)


def test_parts_in_two_formats_are_refused(folder: Path, unread: None) -> None:
    """The blocks of both formats have the same size, so that nothing else would fail."""
    parts = {"blk.1.ffn_gate_exps.weight": "Q4_0", "blk.1.ffn_up_exps.weight": "IQ4_NL"}
    write(folder / "parts.gguf", "qwen35moe", formats=parts)
    message = "expected one format for model.layers.1.mlp.experts.gate_up_proj, got Q4_0 and IQ4_NL"
    with pytest.raises(GGUFError, match=message):
        load(folder, "parts")


def test_a_missing_tensor_is_named(folder: Path, unread: None) -> None:
    path = write(folder / "missing.gguf", "lfm2", without="blk.1.attn_k.weight")
    with pytest.raises(GGUFError) as caught:
        load(folder, "missing")
    assert str(caught.value) == (
        f"{path}: expected a tensor for each weight of Lfm2ForCausalLM, "
        "got none for model.layers.1.self_attn.k_proj.weight"
    )


def test_a_model_without_head_is_refused(folder: Path, unread: None) -> None:
    message = r"of Lfm2Model, got none for embed_tokens.weight, and \d+ others; load it with Auto"
    with pytest.raises(GGUFError, match=message):
        AutoModel.from_pretrained(folder, gguf_file="lfm2.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "dtype of from_pretrained: expected torch.float32 or .*float64"),
        ({"device_map": "mps"}, "device_map: expected a CPU, or a GPU .* got mps; give device_map"),
        ({"device_map": {"": "xpu:0"}}, "device_map: expected a CPU, .* got xpu:0"),
    ],
)
def test_unsuitable_options_are_refused(
    options: dict[str, Any], message: str, folder: Path, unread: None
) -> None:
    with pytest.raises(ArgumentError, match=message):
        load(folder, "lfm2", **options)


def test_too_little_memory_is_refused(
    folder: Path, unread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("q4jit.transformers.room.available_bytes", lambda _: 100_000)
    with pytest.raises(DeviceError, match=r"memory for the weights on cpu: expected 0.00 GB"):
        load(folder, "lfm2")


def test_another_activation_of_experts_is_refused(
    folder: Path, unread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Any = GgufExperts.__init__

    def with_gelu(self: Any, *args: Any) -> None:
        original(self, *args[:-1], nn.GELU())

    monkeypatch.setattr(GgufExperts, "__init__", with_gelu)
    message = r"model.layers.0.mlp.experts \(GgufExperts\): expected the activation SiLU, got GELU"
    with pytest.raises(ArgumentError, match=message):
        load(folder, "qwen35moe")
