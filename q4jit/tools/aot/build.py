"""Run a build, from the request to the files in its folder."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from q4jit.compilers import cache
from q4jit.compilers.codeobject import kernel_infos, unpacker
from q4jit.compilers.find import HipCompiler, find_compiler
from q4jit.tools.aot.folder import OutputFolder, checksums
from q4jit.tools.aot.header import HEADER, header_text
from q4jit.tools.aot.manifest import MANIFEST, manifest_of
from q4jit.tools.aot.products import BuiltLaunch, products_of
from q4jit.tools.aot.request import BuildRequest

Progress = Callable[[Sequence[Any]], Iterable[Any]]


def build(
    request: BuildRequest, out: Path, *, force: bool = False, progress: Progress = iter
) -> Any:
    """Compile the requested kernels into the folder `out`, and return the manifest.

    progress: takes the list of launches to compile and yields them one after the other. Files of
    an earlier build are replaced; other files only with `force`. Raises TargetError, CompileError,
    FileExistsError (before anything is written) and OSError.
    """
    products = products_of(request)
    launches = [launch for product in products for launch in product.launches]
    stems = [launch.stem for launch in launches]
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".hip", ".hsaco")]
    with OutputFolder(out, MANIFEST, out) as folder:
        folder.check([*names, HEADER], force=force)
        unpacker()  # raises before the long work if msgpack is missing
        compilers = {target: find_compiler(target) for target in request.targets}
        objects = {}
        for launch in progress(launches):
            objects[launch.stem] = _compiled(launch, compilers[launch.source.target])
        files = {}
        for launch in launches:
            files[f"{launch.stem}.hip"] = launch.source.text.encode()
            files[f"{launch.stem}.hsaco"] = objects[launch.stem]
        infos = {
            launch.stem: kernel_infos(objects[launch.stem])[launch.source.symbol]
            for launch in launches
        }
        files[HEADER] = header_text(products, infos).encode()
        manifest = manifest_of(request, products, infos, compilers)
        manifest |= {"header": HEADER, "files": checksums(files)}
        folder.write(files, manifest)
    return manifest


def _compiled(launch: BuiltLaunch, compiler: HipCompiler) -> bytes:
    source = launch.source
    return cache.fetch(source.target, compiler, source.symbol, source.text).object_bytes
