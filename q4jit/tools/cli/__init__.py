"""The command `q4jit`: one module per subcommand, with its options and what it runs."""
