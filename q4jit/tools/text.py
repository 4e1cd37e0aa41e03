"""Words that commands and reports print."""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number of things in words: `1 kernel`, `2 kernels`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def visible(text: str) -> str:
    """Return `text` without what steers a terminal: names come from files that others made."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
