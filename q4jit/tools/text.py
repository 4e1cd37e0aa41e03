"""Wording that commands and reports share."""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: `1 kernel`, `2 kernels`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def visible(text: str) -> str:
    """Return `text` with control characters escaped: tensor names come from untrusted files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def in_bytes(size: int) -> str:
    """Return a size: `512 bytes`, `12.0 KiB`, `3.4 MiB`."""
    if size < 1 << 10:
        return counted(size, "byte")
    unit, name = next(
        u for u in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")) if size >= u[0]
    )
    return f"{size / unit:.1f} {name}"


def age(seconds: float) -> str:
    """Return an age in its largest unit: `5 s`, `3 min`, `2 h`, `9 days`."""
    for unit, name in ((86400, "day"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            number = int(seconds // unit)
            return counted(number, name) if name == "day" else f"{number} {name}"
    return f"{int(seconds)} s"
