"""The CPU back end, which compiles kernels through LLVM IR.

- `backend` lists the stages for the pipeline.
- `schedule` chooses the register tile, the instruction and the weight layout of each kernel.
- `lower` writes a kernel's text, in two phases: `rows` (with `digits`) and `columns`.
- Products: `products` multiplies floats and `gguf_rows` single columns. `integers` multiplies
  digits, with `exact_sums`, `dots`, `dot_writer` and `rough`.
- The graph's arithmetic: `values` and `operations`.
- `llvm_text` and `lanes` write IR; `fields` reads blocks of weights.
- `launch` runs the compiled kernels on arrays, with temporaries in `scratch`.
"""
