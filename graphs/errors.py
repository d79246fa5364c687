"""The error of the user's input."""


class MesaError(Exception):
    """An error of the user's input, shown as one line; the command line exits with status 2."""
