"""Run a GGUF file through transformers in a process of its own: logits, a text and the memory.

Run it as `python -m tests.support.torch.run_model packed FILE PROMPT RESULT`, or with `floats` for
transformers' own loader, which dequantises. RESULT is the .npz file that it writes.
"""

import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

# imported here, so that their memory is not counted as a model's
from transformers.models.gemma3 import modeling_gemma3  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from q4jit.transformers import from_gguf
from tests.support.torch.tiny.files import load, load_tokenizer

TOKENS: Final = 16
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


def main(kind: str, path: Path, prompt: str, result: Path) -> None:
    """Load, run and measure a model, and write what came out."""
    transformers.logging.set_verbosity_error()
    before = memory_bytes("VmRSS")
    if kind == "packed":
        model, tokenizer = from_gguf(path)
    else:
        model, tokenizer = load(path), load_tokenizer(path)
    ids = encoded(tokenizer, prompt)
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
        peak = memory_bytes("VmHWM") - before
        text = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    np.savez(result, ids=ids, logits=logits, text=text, peak=peak)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
