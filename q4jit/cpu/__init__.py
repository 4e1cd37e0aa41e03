"""The CPU back end; `backend` names its stages for the pipeline.

`schedule` chooses a kernel's tile and its instruction. `lower` makes the text: with `values` and
`operations` for the graph's arithmetic, `rows` and `digits` for the rows phase, and `columns` on
`products`, `gguf_rows`, `integers`, `exact_sums`, `rough` and `dot_writer` for the columns phase,
all of which write through `llvm_text` and `lanes` and read blocks through `fields`. `launch` calls
the compiled kernels on arrays, with temporaries in `scratch`.
"""
