"""Thin commands: the `mesart` command line and the scripts of its maintainers."""
