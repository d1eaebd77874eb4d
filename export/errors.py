"""The exception of this room."""


class ExportError(Exception):
    """A user-visible failure: what was wrong, where, what to do. One line per finding."""
