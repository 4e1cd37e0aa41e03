"""examples/transformers_generate.py: chats, streams, and explains errors."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.tools import gemma_file, model_file

sys.path.insert(0, str(ROOT / "examples"))

from transformers_generate import _TimedStreamer, main

pytestmark = pytest.mark.model
SPEED = r"prompt: \d+ tokens, [\d.]+ tokens/s; answer: \d+ tokens, [\d.]+ tokens/s; peak \d+ MiB"


def run(*arguments: str) -> int:
    return main(["--model", str(model_file()), *arguments])


@pytest.fixture(autouse=True)
def _no_variable_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.mark.parametrize("options", [[], ["--no-fuse"]])
def test_an_answer_is_streamed_with_its_speed(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("What is the capital of France?", "--max-tokens", "12", *options) == 0
    shown = capsys.readouterr()
    assert shown.out == "The capital of France is Paris.\n"
    assert re.search(SPEED, shown.err)


def test_a_chat_remembers_earlier_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n\nSay it again."))
    assert run("--max-tokens", "12") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "The capital of France is Paris."
    assert "Paris" in shown.out.splitlines()[1]
    first, second = (int(length) for length in re.findall(r"prompt: (\d+) tokens", shown.err))
    assert second > first + 12  # the question, the answer and the second line


def test_a_text_is_continued_and_drawn_with_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["--raw", "Once upon a time", "--temperature", "1", "--seed", "3", "--max-tokens", "8"]
    texts = []
    for _ in range(2):
        assert run(*drawn) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].strip()


def test_ctrl_c_ends_an_answer_of_a_chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[object] = []

    def interrupted(streamer: Any, value: Any) -> None:
        put(streamer, value)
        puts.append(value)
        if len(puts) == 4:  # the third token of the first answer
            raise KeyboardInterrupt

    put = _TimedStreamer.put
    monkeypatch.setattr(_TimedStreamer, "put", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\nSay it again."))
    assert run("--max-tokens", "4") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("The capital of")
    assert shown.err.count("stopped by --max-tokens") == 1  # the second answer
    assert len(re.findall(SPEED, shown.err)) == 2
    puts.clear()
    assert run("What is the capital of France?") == 130


def test_prompts_that_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, words in (("", "the prompt is empty"), ("caf\udce9", "the prompt is not text")):
        assert run("--raw", prompt) == 1
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_file_without_chat_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(gemma_file()), "Hello"]) == 1
    (line,) = capsys.readouterr().err.splitlines()  # nothing was loaded
    assert "use --raw" in line


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "model.gguf"
    wrong.write_bytes(b"GGML" + bytes(60))
    for model, words in ((wrong, "GGUF"), (tmp_path / "none.gguf", "No such file")):
        assert main(["--model", str(model), "Hello"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("transformers_generate.py: ")
        assert words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "at least 0.001"),
        (["--temperature", "1e-40"], "at least 0.001"),
        (["--top-p", "0"], "more than 0"),
        (["--seed", "99999999999999999999"], "2**63"),
        (["--compile"], "needs --device cuda"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("Hello", *options)
    assert words in capsys.readouterr().err
