"""`q4jit selftest`: every schedule of a GPU held to the contract, then timed, with a report.

The kernels are forced (`PlanOptions`), where a call would choose one. Each result is set to NaN
before the kernels run, and compared with float64 products of weights that `formats.decode` decodes.
A case that raises an error is a failed case, and the next one runs. The report is written however
the run ends, with all that is known by then.

    cases, checks ──run──▶ outcomes ─┐
    timed products ──timing──────────┴──▶ Findings ──report──▶ report.txt, report.json
"""
