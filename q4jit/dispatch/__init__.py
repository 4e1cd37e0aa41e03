"""From a call with new shapes to kernels that serve it and the calls like it.

`options` and `policy` say how and where a call runs; `tracer` and `nested` trace the function,
`specializer` plans, compiles and binds, and `kept` holds what was made. `results` puts arrays into
the containers that the function returns, `causes` warns of calls that never stop compiling,
`interpreted` runs the function in NumPy, and `pickling` sends it to other processes.
"""
