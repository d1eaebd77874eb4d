"""The exception of this room."""


class SurgeryError(Exception):
    """A user-visible failure: what was wrong, where, what to do. One line."""
