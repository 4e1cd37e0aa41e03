"""The command `q4jit`: a module for each of its commands, with its arguments and what it does."""
