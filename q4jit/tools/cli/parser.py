"""The parser of a command line, and the examples that its help ends with."""

import argparse
from typing import Any, Final, NoReturn

EXAMPLES: Final = """\
examples:
  q4jit build --k 4096 --n 11008 --format q4_0 --arch gfx1100 --out kernels
  q4jit build --gguf model.gguf --arch gfx1100 --arch gfx942 --m 1 --m 512 --out kernels
  q4jit build --entry generic --format q4_0 --arch gfx1100 --out kernels
  q4jit pack --gguf model.gguf --tensor blk.0.ffn_up.weight --layout planar --out up.bin
  q4jit tune --shape 4096x14336 --format q4_0 --m 1 --m 512
  q4jit bench --shape 4096x14336 --m 1,8 --json bench.json --plot roofline.png
  q4jit bench --target cpu --threads 1,2 --ggml venv/lib/libggml-cpu.so
  q4jit selftest --device hip:0 --out report
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=shape, **options)

    def error(self, message: str) -> NoReturn:
        """End the process with a line and the exit status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")
