"""`q4jit selftest`: check every schedule of a GPU against its error bound, then time it.

Each case forces the kernels that run (`PlanOptions`), where a call would choose them. Results are
set to NaN before the kernels run, and compared with float64 products of weights that NumPy decodes
(`formats.decode`). A case that raises an error counts as failed, and the next one runs. The report
is written even if the run is interrupted.

    cases, checks ──run──▶ CaseOutcomes ─┐
    products ──timing──▶ Timings ────────┴──▶ Findings ──report──▶ report.txt, report.json
"""
