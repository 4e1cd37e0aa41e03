"""Tell PyInstaller which files q4jit reads when it runs."""

from pathlib import Path


def hook_directories() -> list[str]:
    """Return the folders with hooks, for PyInstaller's entry point `hook-dirs`."""
    return [str(Path(__file__).parent)]
