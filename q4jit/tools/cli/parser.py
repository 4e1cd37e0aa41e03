"""The argument parser, and the end of each help text: examples and exit statuses."""

import argparse
from collections.abc import Mapping
from typing import Any, Final, NoReturn

LEFT_OUT: Final = 3  # `q4jit build` left out matrices of the file
INTERRUPTED: Final = 130  # what a shell reports for SIGINT


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line to standard error and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def epilog(
    examples: str, success: str, failure: str, others: Mapping[int, str] | None = None
) -> str:
    """Return the end of a help text.

    examples: command lines, one per line. success, failure: when the exit status is 0, and when 1.
    others: when it is another number.
    """
    lines = "".join(f"  {line}\n" for line in examples.strip().splitlines())
    statuses = {
        0: success,
        1: failure,
        2: "the command line is invalid",
        **(others or {}),
        INTERRUPTED: "interrupted by Ctrl-C",
    }
    table = "".join(f"  {status:<3}  {meaning}\n" for status, meaning in statuses.items())
    return f"examples:\n{lines}\nexit status:\n{table}"
