"""Wording that commands and reports share."""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: `1 kernel`, `2 kernels`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def visible(text: str) -> str:
    """Return `text` with control characters escaped: tensor names come from untrusted files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
