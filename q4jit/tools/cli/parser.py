"""The argument parser, and the end of each help text: examples and exit statuses."""

import argparse
from typing import Any, Final, NoReturn

INTERRUPTED: Final = 130  # what a shell reports for SIGINT


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line to standard error and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def epilog(examples: str, success: str, failure: str) -> str:
    """Return the end of a help text.

    examples: command lines, one per line. success, failure: when the exit status is 0, and when 1.
    """
    lines = "".join(f"  {line}\n" for line in examples.strip().splitlines())
    return (
        f"examples:\n{lines}\n"
        "exit status:\n"
        f"  0    {success}\n"
        f"  1    {failure}\n"
        "  2    the command line is invalid\n"
        f"  {INTERRUPTED}  interrupted by Ctrl-C\n"
    )
