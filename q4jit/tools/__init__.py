"""Programs built on the library: the command `q4jit` and the packages behind its subcommands."""
