"""The front end: it runs a NumPy function once on symbols and keeps the graph of what it did.

`trace` runs the function on the symbols of `symbols` and `ids`. `operations` turns each NumPy call
into nodes by the rules of `builder`. `refusals` words the errors for code that cannot be compiled,
and `carets` finds the user's line for them. The result is a `graph` of nodes with symbolic
`shapes`, for arguments that `specs` describe. `statements` prints a graph. `elementary` states exp,
log and tanh for all targets.
"""
