"""A small GGUF reader for files that nobody vouches for.

Layout (ggml's `docs/gguf.md`, versions 2 and 3, little-endian): magic, version u32, tensor count
u64, key count u64; per key: name, type u32, value; per tensor: name, number of dimensions u32,
dimensions u64 each (the contiguous one first), ggml type u32, offset u64; then, aligned to
`general.alignment`, the data that the offsets count from. A string is a u64 length and UTF-8 bytes.

Every count is held against the bytes left before it is used, so a damaged file costs neither
memory nor time. Opening checks the whole header: sizes, alignment, bounds and overlap of every
tensor. A tensor of a format or rank that q4jit cannot read does not keep the others from being
used: it raises when it is asked for. So does text that is not UTF-8.

`reader` is the cursor that checks counts, `metadata` reads the keys and `tensors` the table of
tensors; `file` maps a file and gives users the mapping `GGUFFile`.
"""
