"""The room's user error."""

from __future__ import annotations


class HarnessError(Exception):
    """A user-visible failure: what was wrong, where, what to do. One line."""
