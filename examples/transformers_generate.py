"""Chat with a GGUF file through transformers: its weights stay packed, on a CPU or a GPU.

    python examples/transformers_generate.py --model model.gguf "Why is the sky blue?"
    python examples/transformers_generate.py --model model.gguf          # a chat, line by line
    python examples/transformers_generate.py --model model.gguf --device cuda --dtype bfloat16

The answer is streamed. Tokens per second and peak memory follow on standard error; the first answer
includes the time of compiling. Ctrl-C ends an answer, and Ctrl-D the chat. Every file that
q4jit.transformers.from_gguf takes works (docs/models.md); examples/generate.py shows how a decoder
is written without transformers.
"""

import argparse
import io
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, load the model and answer. Return the exit status."""
    options = _parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    # PyTorch's threads must not keep the kernels' from working. It reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        # late, so that --help needs neither PyTorch nor seconds
        from q4jit import Q4JitError
        from q4jit.transformers import from_gguf
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        print(f"transformers_generate.py: {error}", file=sys.stderr)
        return 1
    try:
        _check_template(options)
        model, tokenizer = from_gguf(
            options.model, device=options.device, dtype=options.dtype, precision=options.precision
        )
        if options.fuse:
            _fuse(model)
        chat = Chat(model, tokenizer, options)
        for prompt in _prompts(options):
            chat.answer(prompt)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the answer has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Q4JitError, OSError, RequestError) as error:
        print(f"transformers_generate.py: {error}", file=sys.stderr)
        return 1
    return 0


class RequestError(Exception):
    """The file or the prompt cannot serve for what was asked."""


def _check_template(options: argparse.Namespace) -> None:
    """Raise RequestError, before minutes are spent, if the model cannot be asked."""
    from q4jit import load_gguf

    with load_gguf(options.model) as file:
        if not options.raw and "tokenizer.chat_template" not in file.metadata:
            message = "the file has no chat template; use --raw to let the model continue a text"
            raise RequestError(message)


def _fuse(model: Any) -> None:
    """Fuse the layers of architectures that `fuse` knows."""
    from q4jit import ArgumentError
    from q4jit.torch import fuse

    try:
        fuse(model)
    except ArgumentError as error:
        print(f"not fused: {error}", file=sys.stderr)


class Chat:
    """A conversation with a model. Answers are printed while they are written."""

    def __init__(self, model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
        """Begin a conversation."""
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._messages: list[dict[str, str]] = []

    def answer(self, prompt: str) -> None:
        """Print the answer to a prompt, which may follow earlier ones, and the speed.

        Ctrl-C ends the answer. It then ends the program, too, unless more prompts can follow.
        """
        import torch
        from transformers import TextStreamer

        inputs = self._inputs(prompt).to(self._model.device)
        prompt_length = inputs["input_ids"].shape[1]
        if not prompt_length:
            raise RequestError("the prompt is empty")
        text = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer = _TimedStreamer(text)
        if self._options.seed is not None:
            torch.manual_seed(self._options.seed)
        try:
            with torch.inference_mode():
                self._model.generate(**inputs, **_sampling(self._options), streamer=streamer)
        except KeyboardInterrupt:
            if self._options.prompt is not None:
                raise
            streamer.end()
        written = streamer.tokens
        answer = self._tokenizer.decode(written, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        if len(written) == self._options.max_tokens:
            print("\n(stopped by --max-tokens)", file=sys.stderr)
        print(f"\n{streamer.summary(prompt_length)}; {_peak(self._model.device)}", file=sys.stderr)

    def _inputs(self, prompt: str) -> Any:
        if self._options.raw:
            return self._tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        self._messages.append({"role": "user", "content": prompt})
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                self._messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise RequestError(f"the file's chat template fails: {error}") from error


class _TimedStreamer:
    """Passes tokens on to a streamer, and notes when each came.

    Attributes:
        tokens: the ids of the answer so far.
    """

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self.tokens: list[int] = []
        self._times: list[float] = []  # the first is that of the prompt, before it is read

    def put(self, value: Any) -> None:
        """Take the next token, or the prompt."""
        if self._times:
            self.tokens += value.tolist()
        self._times.append(time.perf_counter())
        self._streamer.put(value)

    def end(self) -> None:
        """Print what is left."""
        self._streamer.end()

    def summary(self, prompt_length: int) -> str:
        """Return the speeds of reading the prompt and of writing the answer."""
        start, *tokens = self._times or [0.0]
        if not tokens:
            return "no token was written"
        prompt = prompt_length / (tokens[0] - start)
        text = f"prompt: {prompt_length} tokens, {prompt:.1f} tokens/s"
        if len(tokens) > 1:
            written = (len(tokens) - 1) / (tokens[-1] - tokens[0])
            text += f"; answer: {len(tokens)} tokens, {written:.1f} tokens/s"
        return text


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {"max_new_tokens": options.max_tokens}
    if options.compile:
        values["cache_implementation"] = "static"  # transformers then compiles the decoding step
    if not options.temperature:
        return values | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    drawn = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    return values | drawn


def _peak(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return f"peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on {device}"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"peak {kilobytes / 2**10:.0f} MiB of the process"


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    """Yield the prompt of the command line, or else the lines of standard input."""
    if options.prompt is not None:
        yield _text(options.prompt)
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        try:
            line = _text(sys.stdin.readline())
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt is not text: {error}") from error
        if not line:
            return
        if line.strip():
            yield line.strip()


def _text(given: str) -> str:
    """Return a prompt. Raises RequestError if it is not text."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not text: {error}") from error
    return given


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="transformers_generate.py", description="Chat with a GGUF file through transformers."
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="default: each line of standard input is one")
    add("--model", type=Path, required=True, help="GGUF file")
    add("--device", help="cpu, cuda, cuda:1 … (default: cpu)")
    add("--dtype", help="float32, float16 or bfloat16 (default: float32)")
    add("--precision", default="f32", help="of the products: f32, f16 or i8 (default: f32)")
    add("--raw", action="store_true", help="continue the prompt, without a chat template")
    add("--max-tokens", type=int, default=256, help="of an answer (default: 256)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    add("--top-p", type=float, default=1.0, help="draw from this total probability (default: 1)")
    add("--seed", type=int, help="make an answer with a temperature repeatable")
    add("--no-fuse", dest="fuse", action="store_false", help="keep the layers of transformers")
    add("--compile", action="store_true", help="on a GPU: compile decoding, which takes a minute")
    options = parser.parse_args(arguments)
    if options.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, not {options.max_tokens}")
    if options.temperature and not 0.001 <= options.temperature < float("inf"):
        parser.error(f"--temperature must be 0, or at least 0.001, not {options.temperature}")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2**63 - 1, not {options.seed}")
    if options.compile and not str(options.device).startswith("cuda"):
        parser.error("--compile needs --device cuda")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p must be more than 0 and at most 1, not {options.top_p}")
    return options


if __name__ == "__main__":
    sys.exit(main())
