"""Programs on top of the library: the command line and what it runs."""
