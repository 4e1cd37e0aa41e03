"""Arrays: which arguments are accepted, and where they are."""
