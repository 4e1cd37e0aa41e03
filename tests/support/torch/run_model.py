"""Run a GGUF file through transformers in a process of its own: logits, a text and the memory.

Run it as `python -m tests.support.torch.run_model packed FILE TINY PROMPT RESULT`, or with `floats`
for transformers' own loader, which dequantises. TINY is another file, which is run before memory is
measured: it loads libraries. RESULT is the .npz file that is written.
"""

import sys
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
import transformers

from q4jit.transformers import from_gguf
from tests.support.torch.tiny.files import load, load_tokenizer

TOKENS: Final = 8
"""Tokens that are generated."""


def memory_bytes(field: str) -> int:
    """Return a field of this process's memory: VmRSS for what is resident, VmHWM for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024


def encoded(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Return the ids of a prompt, as a question in a chat if the tokenizer has a template."""
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    return ids


def main(kind: str, path: Path, tiny: Path, prompt: str, result: Path) -> None:
    """Load, run and measure a model, and write what came out.

    The memory of the tokenizer, whose vocabulary consists of Python's objects, is counted apart.
    """
    transformers.logging.set_verbosity_error()
    answer(*from_gguf(tiny), prompt)
    start = memory_bytes("VmRSS")
    tokenizer = load_tokenizer(path)
    tokenizer_peak, before = memory_bytes("VmHWM"), memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    if kind == "packed":
        with mock.patch("q4jit.transformers.loading.tokenizer_of", return_value=tokenizer):
            model, _ = from_gguf(path)
    else:
        model = load(path)
    ids, logits, text = answer(model, tokenizer, prompt)
    peak = memory_bytes("VmHWM")
    total = max(peak, tokenizer_peak) - start
    np.savez(result, ids=ids, logits=logits, text=text, peak=peak - before, total=total)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str) -> tuple[Any, Any, Any]:
    """Return the ids of a prompt, the logits of the prompt, and the ids of prompt and answer."""
    ids = encoded(tokenizer, prompt)
    logits = model(ids).logits[0].numpy()
    return ids, logits, model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)


if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    main(kind, Path(words[0]), Path(words[1]), words[2], Path(words[3]))
