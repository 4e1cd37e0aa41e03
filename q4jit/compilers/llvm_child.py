"""Compile LLVM IR with llvmlite, in the user's process or as a program of its own.

As a program, read requests from standard input and write the results to standard output, until the
input ends. A request is a line of JSON with the arguments of `make_machine` and `emit`. A result is
a line of JSON, `{"size": bytes}` or `{"error": LLVM's message}`, and then the bytes.

The module imports nothing from q4jit: the program is started by its path.
"""

import functools
import json
import sys
from typing import Any

import llvmlite.binding as llvm

OPTIMISATION = 3


@functools.cache
def make_machine(triple: str, cpu: str, features: str) -> Any:  # llvmlite has no annotations
    """Return LLVM's target machine."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=OPTIMISATION, reloc="pic", codemodel="small"
    )


def emit(text: str, machine: Any, method: str) -> Any:  # bytes or str, depending on `method`
    """Optimise a text; return its object or assembly. Raises RuntimeError with LLVM's message."""
    module = llvm.parse_assembly(text, llvm.create_context())
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=OPTIMISATION)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return getattr(machine, method)(module)


def _serve() -> None:
    for line in sys.stdin.buffer:
        request = json.loads(line)
        data = b""
        try:
            machine = make_machine(*request["machine"])
            made = emit(request["text"], machine, request["method"])
            data = made.encode() if isinstance(made, str) else bytes(made)
            answer: dict[str, Any] = {"size": len(data)}
        except RuntimeError as error:
            answer = {"error": str(error)}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
