"""The exception of this room."""


class PluginError(Exception):
    """A user-visible failure: what was wrong, where, what to do. One line."""
