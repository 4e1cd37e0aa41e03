"""Collect q4jit's templates, constants and thread pool, which no import names."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("q4jit")
hiddenimports = ["llvmlite.binding"]
