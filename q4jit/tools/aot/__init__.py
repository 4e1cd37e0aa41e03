"""Kernels built ahead of time: plain products that a native program launches without Python.

A build is one folder. It contains the HIP text and the code object of each kernel, `manifest.json`
with everything that a launch needs, and the C header `q4jit_kernels.h` with the same facts as a
table. Equal requests give equal bytes.

    BuildRequest ──products──▶ BuiltProducts ──build──▶ code objects
                                                      ──manifest, header──▶ OutputFolder
"""
