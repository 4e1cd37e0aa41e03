"""`q4jit bench`: compare q4jit's kernels with other libraries in one run.

- An *entrant* computes a product, or is one of the limits: a read of the weight's bytes, or the
  peak rate of multiply-adds.
- A *peer* is an entrant of another library: ggml, NumPy or PyTorch.
- An *arena* is where entrants run: this machine's CPU (`cpu`) or a GPU (`gpu`).
- A *contest* prepares all entrants for one weight and M, checks their results against float64, and
  times them in turns for several rounds. Medians count, and wrong results are not timed.
- A *roofline* plot shows TFLOP/s over FLOP per byte, below the speed that memory allows.

BenchRequest ──work──▶ TimedCall ──arena──▶ Entrants ──contest──▶ Outcomes ──measurements──▶
Measurements ──report──▶ JSON, tables

`ratios`, `speed_targets` and `roofline` evaluate reports.
"""
