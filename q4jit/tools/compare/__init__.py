"""`q4jit bench`: the speed of q4jit's kernels and of every peer that is here, in one run.

For each weight and M all entrants are made ready and held against float64, then they run in turns,
several rounds, and medians count. What is wrong has no time.

BenchRequest ──work──▶ TimedCall ──arena──▶ Entrant ──contest──▶ Outcome ──rows──▶ Row
                                                                       ──report──▶ tables

`gpu` and `cpu` are the two arenas, where entrants run; `ratios`, `targets` and `roofline` show what
reports come to.
"""
