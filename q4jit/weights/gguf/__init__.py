"""A small GGUF reader for untrusted files.

Layout (ggml's `docs/gguf.md`, versions 2 and 3, little-endian): magic, version u32, tensor count
u64, key count u64; per key: name, type u32, value; per tensor: name, number of dimensions u32,
dimensions u64 each (the contiguous one first), ggml type u32, offset u64; then, aligned to
`general.alignment`, the data, where offset 0 is. A string is a u64 length and UTF-8 bytes.

Every count is compared with the number of remaining bytes before it is used, so a damaged file
costs neither memory nor time. Opening a file checks its whole header: sizes, alignment, bounds and
overlap of every tensor. A tensor whose format, rank, dimensions or name q4jit cannot read, and text
that is not UTF-8, raise an error on access; the rest of the file stays usable.

`reader` is the cursor that checks counts, `metadata` reads the keys, `types` knows the types of
ggml, and `tensors` reads the table of tensors; `part` maps one file, `split` joins the parts of a
model, and `file` has `GGUFFile`, the mapping for users.
"""
