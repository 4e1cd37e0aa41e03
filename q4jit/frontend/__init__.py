"""The front end: a NumPy function is run once on symbols, which leaves a graph.

`trace` runs the function on what `symbols` and `ids` define; `operations` turns each NumPy call
into nodes by the rules of `builder`, and `refusals` and `carets` word what cannot be compiled and
find the user's line. The result is a `graph` of nodes with symbolic `shapes`, for arguments that
`specs` describe; `statements` prints it, and `elementary` states exp, log and tanh for all targets.
"""
