"""The demo: its model against llama.cpp, its errors, and its program."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from q4jit import GGUFError, QuantizedTensor, load_gguf, quantize
from tests.support.paths import ROOT, TESTS
from tests.support.tools import model_file

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

from generate import main  # noqa: E402
from llama import CHUNK, Config, Llama  # noqa: E402
from requantize import requantized  # noqa: E402
from session import Picker  # noqa: E402
from tokenizer import GGUFTokenizer, render_chat  # noqa: E402

REFERENCE: dict[str, Any] = json.loads(
    (TESTS / "data" / "smollm2_reference.json").read_text(encoding="utf-8")
)
TOKENS: list[int] = REFERENCE["tokens"]
# The reference is llama.cpp's own f32 arithmetic, which rounds too. The 30 layers turn the kernels'
# 2e-6 into about 1e-5.
LIMIT = 1e-4

Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def model_path() -> Path:
    return model_file()


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> GGUFTokenizer:
    return GGUFTokenizer(load_gguf(model_path).metadata)


@pytest.fixture(scope="module", params=["as_shipped", "requantised_q4_0"])
def case(request: pytest.FixtureRequest, model_path: Path) -> tuple[Llama, dict[str, Any]]:
    """Return a model, and llama.cpp's results with the same weights."""
    file = load_gguf(model_path)
    shipped = request.param == "as_shipped"
    tensors = file if shipped else requantized(model_path, file, list)
    return Llama(file.metadata, tensors), REFERENCE[request.param]


def relative_rms(result: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(np.subtract(result, wanted, dtype=float)) / np.linalg.norm(wanted))


def greedy(model: Llama, prompt: Sequence[int], count: int) -> list[int]:
    state = model.state(len(prompt) + count)
    tokens = [int(model.forward(prompt, state).argmax())]
    while len(tokens) < count:
        tokens.append(int(model.forward(tokens[-1:], state).argmax()))
    return tokens


@pytest.mark.model
def test_token_ids_are_llama_cpps(tokenizer: GGUFTokenizer) -> None:
    assert tokenizer.encode(REFERENCE["text"]) == TOKENS
    assert tokenizer.encode(REFERENCE["chat_text"]) == REFERENCE["chat_tokens"]


@pytest.mark.model
def test_the_chat_template_of_the_file_gives_the_reference_prompt(
    tokenizer: GGUFTokenizer, model_path: Path
) -> None:
    template = load_gguf(model_path).metadata["tokenizer.chat_template"]
    assert isinstance(template, str)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert render_chat(template, messages, tokenizer) == REFERENCE["chat_text"]


@pytest.mark.model
def test_characters_of_several_tokens_are_streamed_whole(tokenizer: GGUFTokenizer) -> None:
    text = "naïve 日本語 😀👩‍👩‍👧 Ελληνικά — 12345\n\ttab  \u00a0"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join([*parts, stream.finish()]) == text == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts  # some characters have several tokens


@pytest.mark.model
def test_an_incomplete_character_becomes_a_replacement_sign(tokenizer: GGUFTokenizer) -> None:
    stream = tokenizer.stream()
    first = next(i for i in tokenizer.encode("語") if len(tokenizer.token_bytes(i)) < 3)
    assert (stream.push(first), stream.finish()) == ("", "\ufffd")


@pytest.mark.model
def test_logits_are_llama_cpps(case: tuple[Llama, dict[str, Any]]) -> None:
    model, wanted = case
    logits = model.forward(TOKENS, model.state(len(TOKENS)), every=True)
    assert logits.shape == (len(TOKENS), model.config.vocabulary)
    assert logits.dtype == np.float32
    for position, some in wanted["logits"].items():
        row = logits[int(position)].astype(float)
        assert relative_rms(row[REFERENCE["vocabulary_ids"]], np.array(some)) <= LIMIT
        assert np.linalg.norm(row) == pytest.approx(wanted["logits_norm"][position], rel=LIMIT)

    # The likeliest token is llama.cpp's if the margin exceeds the tolerance of the logits.
    best, theirs = logits.max(axis=1), logits[np.arange(len(TOKENS)), wanted["argmax"]]
    tolerance = 4 * LIMIT * np.sqrt(np.mean(logits.astype(float) ** 2, axis=1))
    assert (best - theirs <= tolerance).all()

    scores = logits[:-1].astype(float)
    scores -= scores.max(axis=1, keepdims=True)
    taken = scores[np.arange(len(scores)), TOKENS[1:]]
    nll = np.mean(np.log(np.exp(scores).sum(axis=1)) - taken)
    assert nll == pytest.approx(wanted["mean_nll"], rel=1e-5)


@pytest.mark.model
def test_greedy_continuations_are_llama_cpps(case: tuple[Llama, dict[str, Any]]) -> None:
    model, wanted = case
    prompt = TOKENS[: REFERENCE["greedy_prompt_length"]]
    for start, name in ((prompt, "greedy"), (REFERENCE["chat_tokens"], "chat_greedy")):
        # far above rounding errors, so the tokens are equal
        assert min(wanted[f"{name}_margin"]) > 0.02
        assert greedy(model, start, len(wanted[name])) == wanted[name]


@pytest.mark.model
def test_a_prompt_may_be_split_anywhere(case: tuple[Llama, dict[str, Any]]) -> None:
    model, _ = case
    tokens = (TOKENS * 4)[: CHUNK + 30]
    whole = model.forward(tokens, model.state(len(tokens)))
    state = model.state(len(tokens) + 5)
    for start, stop in ((0, 1), (1, 3), (3, 20), (20, CHUNK + 29), (CHUNK + 29, CHUNK + 30)):
        last = model.forward(tokens[start:stop], state)
    assert state.length == len(tokens)
    assert relative_rms(last, whole) <= LIMIT


# A model of a few kilobytes, for tests that need no sensible text.


def tiny_metadata() -> Metadata:
    bytes_of_text = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_of_text, "he", "Ġhe"]
    return {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["h e", "Ġ he"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def tiny_tensors(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Name → (K, N) or (width,)."""
    width, wide = 64, 96
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (width, len(metadata["tokenizer.ggml.tokens"])),
        "output_norm": (width,),
    }
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_norm": (width,),
            f"blk.{i}.attn_q": (width, width),
            f"blk.{i}.attn_k": (width, width // 2),
            f"blk.{i}.attn_v": (width, width // 2),
            f"blk.{i}.attn_output": (width, width),
            f"blk.{i}.ffn_norm": (width,),
            f"blk.{i}.ffn_gate": (width, wide),
            f"blk.{i}.ffn_up": (width, wide),
            f"blk.{i}.ffn_down": (wide, width),
        }
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write_tiny(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q4_1,
    seed: int = 0,
) -> Path:
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    random = np.random.default_rng(seed)
    for name, shape in (tiny_tensors(tiny_metadata()) if tensors is None else tensors).items():
        data = random.standard_normal(shape[::-1]).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def environment() -> dict[str, str]:
    """Return variables with which the program finds the library without an installation."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONIOENCODING": "utf-8",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def generate(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, EXAMPLES / "generate.py", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


REFUSED: list[tuple[Metadata, str]] = [
    ({"general.architecture": "gemma3"}, r"general\.architecture: expected 'llama', got 'gemma3'"),
    ({"tokenizer.ggml.model": "llama"}, r"got model 'llama' with pre 'smollm'"),
    (
        {"tokenizer.ggml.pre": "qwen2"},
        r"expected model 'gpt2' with pre 'smollm', got .* with pre 'qwen2'",
    ),
    ({"tokenizer.ggml.pre": None}, r"got .* with pre None"),
    (
        {"tokenizer.ggml.tokens": None},
        r"tokenizer\.ggml\.tokens: expected an array of strings, got",
    ),
    (
        {"tokenizer.ggml.token_type": [1, 1]},
        r"token_type: expected a number for each of \d+ tokens, got 2 numbers",
    ),
    ({"tokenizer.ggml.merges": None}, r"merges: expected an array of strings, got nothing"),
    ({"tokenizer.ggml.merges": ["h e l"]}, r"'h e l' is not a pair"),
    ({"tokenizer.ggml.merges": ["e y"]}, r"merges do not fit the vocabulary: .*ey"),
    ({"tokenizer.ggml.eos_token_id": 1000}, r"eos_token_id: expected 0 to \d+, got 1000"),
    (
        {"llama.block_count": None},
        r"llama\.block_count: expected a positive whole number, got None",
    ),
    ({"llama.block_count": 3}, r"no tensor 'blk\.2\.attn_norm\.weight'"),
    ({"llama.block_count": 1}, r"'blk\.1\.attn_\w+\.weight' is not part of this llama decoder"),
    ({"llama.embedding_length": 0}, r"embedding_length: expected .*, got 0"),
    ({"llama.attention.head_count": 3}, r"head_count 3 must divide .* 64"),
    ({"llama.attention.head_count_kv": 3}, r"head_count_kv 3 must divide .* 4"),
    (
        {"llama.attention.layer_norm_rms_epsilon": None},
        r"epsilon: expected a positive number, got None",
    ),
    ({"llama.rope.freq_base": float("nan")}, r"freq_base: expected .*, got nan"),
    ({"llama.rope.dimension_count": 8}, r"dimension_count: expected 16, got 8"),
    ({"llama.rope.scaling.type": "yarn"}, r"scaling\.type: expected 'none', got 'yarn'"),
    ({"llama.expert_count": 8}, r"expert_count: expected 0, got 8"),
    (
        {"llama.feed_forward_length": 128},
        r"shape of .*ffn_gate.*: expected \(64, 128\), got \(64, 96\)",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_an_unsuitable_file_is_refused(change: Metadata, message: str, tmp_path: Path) -> None:
    changed = tiny_metadata() | change
    metadata = {key: value for key, value in changed.items() if value is not None}
    file = load_gguf(write_tiny(tmp_path / "tiny.gguf", metadata))

    def prepare() -> None:
        Config.from_metadata(file.metadata)
        GGUFTokenizer(file.metadata)
        Llama(file.metadata, file)

    with pytest.raises(GGUFError, match=message):
        prepare()


class Conversion:
    """Converts a tiny model's weights as the demo does, and notes their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []

    def __call__(self) -> dict[str, Any]:
        self.names = []
        return requantized(self.path, load_gguf(self.path), self._note)

    def _note(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            self.names.append(name)
            yield name


@pytest.fixture
def conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conversion:
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    return Conversion(write_tiny(tmp_path / "tiny.gguf", tiny_metadata()))


def kept_file(tmp_path: Path) -> Path:
    [path] = (tmp_path / "cache" / "models").iterdir()  # no temporary file is left
    return path


def assert_same_blocks(tensors: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if isinstance(tensor, QuantizedTensor):
            assert tensors[name].format == tensor.format == "Q4_0"
            np.testing.assert_array_equal(tensors[name].raw, tensor.raw)


def test_weights_are_converted_once_per_source(conversion: Conversion) -> None:
    first = conversion()
    assert len(conversion.names) == 15
    down = load_gguf(conversion.path)["blk.1.ffn_down.weight"]
    assert isinstance(down, QuantizedTensor)
    np.testing.assert_array_equal(
        first["blk.1.ffn_down.weight"].raw,
        gguf.quants.quantize(down.dequantize().T, GGMLQuantizationType.Q4_0),
    )
    os.utime(conversion.path, (1, 1))
    second = conversion()
    assert conversion.names == []
    assert_same_blocks(second, first)


def test_kept_weights_are_not_those_of_another_file(conversion: Conversion) -> None:
    first, facts = conversion(), conversion.path.stat()
    write_tiny(conversion.path, tiny_metadata(), seed=1)
    os.utime(conversion.path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert conversion.path.stat().st_size == facts.st_size
    second = conversion()
    assert len(conversion.names) == 15
    name = "blk.1.ffn_down.weight"
    assert (first[name].raw != second[name].raw).any()
    source = load_gguf(conversion.path)[name]
    assert isinstance(source, QuantizedTensor)
    wanted = quantize(source.dequantize(), "Q4_0")
    np.testing.assert_array_equal(second[name].raw, wanted.raw)


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: b"x" * len(whole), lambda whole: whole[:-1] + b"?"]
)
def test_a_damaged_kept_file_is_written_again(
    damage: Callable[[bytes], bytes], conversion: Conversion, tmp_path: Path
) -> None:
    first = conversion()
    kept = kept_file(tmp_path)
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert_same_blocks(conversion(), first)
    assert len(conversion.names) == 15
    assert kept_file(tmp_path).read_bytes() == whole


def test_what_is_no_kept_file_is_replaced(conversion: Conversion, tmp_path: Path) -> None:
    first = conversion()
    kept = kept_file(tmp_path)
    whole, elsewhere = kept.read_bytes(), tmp_path / "elsewhere"
    elsewhere.write_bytes(whole)
    for put in (os.mkfifo, Path.mkdir, partial(Path.symlink_to, target=elsewhere)):
        kept.unlink()
        put(kept)
        assert_same_blocks(conversion(), first)
        assert len(conversion.names) == 15
        assert kept_file(tmp_path).read_bytes() == whole
        assert stat.S_IMODE(kept.lstat().st_mode) == 0o600
    assert elsewhere.read_bytes() == whole


def test_a_folder_that_others_can_write_to_is_not_used(
    conversion: Conversion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    models.chmod(0o770)
    for _ in range(2):
        assert len(conversion()) == 20
        assert len(conversion.names) == 15
        assert "another user could change the files" in capsys.readouterr().err
    assert list(models.iterdir()) == []


def test_weights_that_cannot_be_kept_are_used_anyway(
    conversion: Conversion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert len(conversion()) == 20
    assert "cannot keep the Q4_0 weights" in capsys.readouterr().err


def test_likeliest_and_drawn_tokens() -> None:
    logits = np.log(np.array([[0.1, 0.5, 0.25, 0.15]], np.float32))
    assert Picker(0, 1, None)(logits) == 1

    def drawn(temperature: float, top_p: float, seed: int) -> list[int]:
        pick = Picker(temperature, top_p, seed)
        return [pick(logits) for _ in range(2000)]

    assert drawn(1, 1, 7) == drawn(1, 1, 7) != drawn(1, 1, 8)
    shares = np.bincount(drawn(1, 1, 0), minlength=4) / 2000
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.25, 0.15], atol=0.04)
    assert set(drawn(1, 0.7, 0)) == {1, 2}
    assert set(drawn(0.01, 1, 0)) == {1}


# The program itself.


@pytest.mark.parametrize(
    ("options", "formats"), [((), {"Q4_1"}), (("--requantize",), {"Q4_0"})], ids=str
)
def test_the_answer_is_computed_in_the_formats_of_the_file(
    options: Sequence[str], formats: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("Q4JIT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # `main` sets them for its process
    used: dict[str, Any] = {}

    class Recorder(Llama):
        def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
            used.update(tensors)
            super().__init__(metadata, tensors)

    monkeypatch.setattr("session.Llama", Recorder)
    path = write_tiny(tmp_path / "tiny.gguf", tiny_metadata())
    assert main(["--model", str(path), "--raw", "--max-tokens", "1", *options, "hello"]) == 0
    weights = [tensor for tensor in used.values() if isinstance(tensor, QuantizedTensor)]
    assert len(weights) == 15
    assert {tensor.format for tensor in weights} == formats
    assert (tmp_path / "cache" / "models").exists() == ("--requantize" in options)


@pytest.mark.model
def test_the_demo_answers(model_path: Path) -> None:
    done = generate("--threads", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    assert re.search(
        r"^prompt 37 tokens at \d+ tokens/s; first token after [\d.]+ s; "
        r"answer 8 tokens, decoding [\d.]+ tokens/s$",
        done.stderr,
        re.MULTILINE,
    )


@pytest.mark.model
def test_the_demo_stops_after_max_tokens(model_path: Path) -> None:
    done = generate("--max-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of\n"
    assert "; answer 3 tokens, " in done.stderr


def test_the_demo_measures_itself(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", tiny_metadata())
    done = generate("--model", path, "--raw", "--benchmark")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"prompt of 64 tokens: \d+ tokens/s\ndecoding after 16 tokens: [\d.]+ tokens/s\n",
        done.stdout,
    )


def test_the_demo_stops_where_the_context_ends(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", tiny_metadata())
    arguments = ("--model", path, "--raw", "--max-tokens", 100)
    done = generate(*arguments, "hello you", "--temperature", 2, "--seed", 3)
    assert done.returncode == 0, done.stderr
    answered = re.search(r"answer (\d+) tokens", done.stderr)
    assert answered
    if "<|im_end|>" not in done.stdout:
        assert int(answered[1]) == 57
        assert done.stderr.rstrip().endswith("; the context is full")
    done = generate(*arguments, "x" * 64)
    assert done.returncode == 1
    assert done.stderr == ("generate.py: the prompt has 64 tokens, but the model's context is 64\n")


def test_the_demo_reports_errors_in_one_line(tmp_path: Path) -> None:
    metadata = tiny_metadata()
    del metadata["tokenizer.chat_template"]
    path = write_tiny(tmp_path / "tiny.gguf", metadata)
    foreign = write_tiny(tmp_path / "foreign.gguf", metadata | {"general.architecture": "bert"})
    cases: list[tuple[list[object], str]] = [
        (["--model", tmp_path / "none.gguf"], "No such file or directory"),
        (["--model", EXAMPLES / "generate.py"], "magic"),
        (["--model", foreign], "general.architecture: expected 'llama', got 'bert'"),
        (["--model", path], "the file has no 'tokenizer.chat_template'; use --raw"),
        (["--model", path, "--raw", ""], "the prompt is empty"),
        (["--model", path, "--raw", "--threads", "9999", "hello"], "1024, got '9999'"),
    ]
    for arguments, message in cases:
        done = generate(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("generate.py: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
    for option in ("--top-p=0", "--temperature=-1", "--max-tokens=0", "--threads=0", "--seed=-1"):
        done = generate(option)
        assert done.returncode == 2
        assert f"argument {option.partition('=')[0]}: must be " in done.stderr


def test_an_interrupted_answer_ends_with_the_statistics(tmp_path: Path) -> None:
    metadata = tiny_metadata() | {"llama.context_length": 100_000}
    # no token ends the answer, whichever are drawn before the signal arrives
    del metadata["tokenizer.ggml.eos_token_id"]
    metadata["tokenizer.ggml.tokens"][2] = "<|no end|>"
    path = write_tiny(tmp_path / "tiny.gguf", metadata)
    command: list[str | Path] = [sys.executable, EXAMPLES / "generate.py", "--model", path]
    with subprocess.Popen(
        [
            *command,
            "--raw",
            "--max-tokens",
            "99000",
            "--temperature",
            "1",
            "hello",
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert errors.rstrip().endswith("; interrupted")
    assert "Traceback" not in errors
