"""Ahead-of-time builds: plain products as files that a native program launches without Python.

A build is one folder: for each kernel its HIP text and its code object, `manifest.json`, which says
everything that a launch needs, and the C header `q4jit_kernels.h` with the same as a table. The
same request gives the same bytes.

    BuildRequest ──products──▶ launches ──build──▶ code objects ──manifest, header──▶ OutputFolder
"""
