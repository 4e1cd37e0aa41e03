"""Find old wording: `python -m tests.support.prose FILE_OR_FOLDER…` lists each place.

The project's first prose was hard to read. These patterns catch most of it; `docs/glossary.md` has
the words to use instead.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_OLD: Final = re.compile(
    r"\b(?:what is (?:here|not here|wrong)|of which|such an?|(?:that is|is) none|at hand|lies?|"
    r"stands?(?! for\b| in for\b)|(?:is|are) told|whose like|goes? before|so many|so much|"
    r"worth the way|what of|accepted (?:is|are)|just that many|close to it are)\b"
)
_TEXTS: Final = {".md", ".j2", ".ll", ".toml", ".ipynb"}
_HOME_OF_EXPECTED: Final = "errors.py"


def problems(path: Path) -> Iterator[str]:
    """Yield `path:line: problem` for each old wording in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in _TEXTS:
        pieces: Iterator[tuple[int, str]] = iter(enumerate(text.split("\n"), 1))
    elif path.suffix == ".py":
        yield from _names(path, text)
        pieces = _prose(text)
    else:
        return
    for line, piece in pieces:
        for match in _OLD.finditer(piece):
            yield f"{path}:{line}: {match[0]!r}"


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the comments and strings of a Python file with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in {tokenize.COMMENT, tokenize.STRING} or token.type == getattr(
            tokenize, "FSTRING_MIDDLE", -1
        ):
            for offset, line in enumerate(token.string.split("\n")):
                yield token.start[0] + offset, line


def _names(path: Path, text: str) -> Iterator[str]:
    """Yield variables named `found` and error texts that `errors.expected` should build."""
    if "tests" in path.parts:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name | ast.arg):
            name = node.id if isinstance(node, ast.Name) else node.arg
            if name == "found":
                yield f"{path}:{node.lineno}: a variable named 'found'; say what it holds"
        elif isinstance(node, ast.Raise) and path.name != _HOME_OF_EXPECTED:
            raised = ast.unparse(node)
            if re.search(r"['\"{ ]found ", raised) or re.search(r", got [{'\"a-z]", raised):
                yield f"{path}:{node.lineno}: build this text with errors.expected"


def files(roots: list[Path]) -> Iterator[Path]:
    """Yield the files below the roots that have prose."""
    for root in roots:
        candidates = [root] if root.is_file() else sorted(root.rglob("*"))
        yield from (p for p in candidates if p.suffix in _TEXTS | {".py"} and p.is_file())


def main() -> int:
    """Print every problem; return 1 if there is one."""
    listed = [p for path in files([Path(a) for a in sys.argv[1:]]) for p in problems(path)]
    sys.stdout.writelines(f"{line}\n" for line in listed)
    return bool(listed)


if __name__ == "__main__":
    sys.exit(main())
