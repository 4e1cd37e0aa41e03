"""`q4jit cache`: list, clear and explain the compiled kernels on disk."""

import argparse
import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from q4jit import config
from q4jit.compilers.entries import CacheEntry, entries, evict
from q4jit.errors import ConfigError
from q4jit.tools.cli.arguments import positive
from q4jit.tools.cli.parser import epilog
from q4jit.tools.text import age, counted, in_bytes, visible

_DIFFERENCES: Final = 20  # lines of a difference that are shown
_EXAMPLES: Final = """
q4jit cache path
q4jit cache ls
q4jit cache clear --limit 100
q4jit cache why swiglu
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "cache",
        help="list, clear and explain the compiled kernels on disk",
        description="path: print the directory. ls: list the kernels with sizes and ages. clear:\n"
        "remove them (with --limit only the oldest). why: show the kernels whose text\n"
        "contains WORD, such as a function's name, and why the newest was compiled\n"
        "although there was another. Q4JIT_CACHE_MIB limits the size of the cache.",
        epilog=epilog(_EXAMPLES, "the command succeeded", "an error occurred"),
    )
    command.add_argument("action", choices=tuple(_ACTIONS), help="what to do")
    command.add_argument("word", nargs="?", metavar="WORD", help="for why: a function or a text")
    command.add_argument(
        "--limit",
        type=positive,
        metavar="MIB",
        help="for clear: keep the newest kernels, up to MIB",
    )
    command.set_defaults(run=_cache)
    return command


def _cache(options: argparse.Namespace) -> int:
    if (options.word is not None) != (options.action == "why"):
        options.parser.error("why requires WORD, and only why accepts it")
    if options.limit is not None and options.action != "clear":
        options.parser.error("only clear accepts --limit")
    directory = config.cache_dir()
    if directory is None:
        raise ConfigError("there is no home directory for the cache; set Q4JIT_CACHE_DIR")
    return int(_ACTIONS[options.action](options, directory))


def _path(options: argparse.Namespace, directory: Path) -> int:
    print(directory)
    return 0


def _known(directory: Path, titles: bool = True) -> list[CacheEntry]:
    return entries(directory, titles) if directory.is_dir() else []


def _ls(options: argparse.Namespace, directory: Path) -> int:
    known = _known(directory)
    _print_entries(known)
    print(f"{directory}: {_total(known)}")
    return 0


def _clear(options: argparse.Namespace, directory: Path) -> int:
    limit = 0 if options.limit is None else options.limit << 20
    removed = evict(directory, limit) if directory.is_dir() else []
    print(f"{directory}: removed {_total(removed)}")
    return 0


def _why(options: argparse.Namespace, directory: Path) -> int:
    texts = {entry: entry.text() for entry in _known(directory)}
    matches = [entry for entry, text in texts.items() if options.word in text]
    _print_entries(matches)
    if not matches:
        print(
            visible(f"{directory}: no kernel contains {options.word!r}; the next call compiles it")
        )
        return 1
    *others, newest = matches
    alike = [other for other in others if other.files[0].suffix == newest.files[0].suffix]
    if not alike:
        print(f"{newest.key[:12]} was compiled because no other kernel contains this text")
        return 0
    print(f"{newest.key[:12]} was compiled beside {alike[-1].key[:12]} because", end=" ")
    _print_difference(texts[alike[-1]], texts[newest])
    return 0


def _print_difference(older: str, newer: str) -> None:
    if older == newer:
        print("the target's features, the compiler or its flags differ: the texts are equal")
        return
    print("their texts differ:")
    lines = difflib.unified_diff(older.splitlines(), newer.splitlines(), lineterm="", n=0)
    changes = (line for line in lines if not line.startswith(("---", "+++", "@@")))
    shown = list(itertools.islice(changes, _DIFFERENCES + 1))
    print(*(f"  {visible(line)}" for line in shown[:_DIFFERENCES]), sep="\n")
    if len(shown) > _DIFFERENCES:
        print("  …")


def _print_entries(known: Sequence[CacheEntry]) -> None:
    for entry in known:
        size, old = in_bytes(entry.size_bytes), age(entry.age_s)
        print(f"{entry.key[:12]}{size:>12}{old:>9}  {visible(entry.title)}")


def _total(known: Sequence[CacheEntry]) -> str:
    size = sum(entry.size_bytes for entry in known)
    return f"{counted(len(known), 'kernel')}, {in_bytes(size)}"


_ACTIONS: Final = {"path": _path, "ls": _ls, "clear": _clear, "why": _why}
