"""What TensorRT and Polygraphy say: collect the errors, show the rest as asked."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Literal

Verbosity = Literal["error", "warning", "info", "verbose"]

_LEVELS: dict[Verbosity, int] = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "verbose": 1,
}
_PLUGIN = "NMS_OPT_TRT: "
"""How messages of the plugin begin, where TensorRT gives it a logger."""

_NOISE = ("profileSharing0806", "falling back to empty timing cache")
"""Parts of warnings about which a user can do nothing: a flag that no call here sets, the first
build."""

_MAX_LENGTH = 400
"""Characters of a message that goes into one line."""


class ErrorLog(logging.Handler):
    """Keeps the errors of one call."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep an error of TensorRT; a critical one is Polygraphy's summary."""
        if record.levelno == logging.ERROR:
            message = " ".join(record.getMessage().split()).removeprefix("[E] ")
            self._messages.append(message)

    def first(self, otherwise: object) -> str:
        """Return the first error in one line: of the builder, the cause of the later ones."""
        return self._one(0, otherwise)

    def last(self, otherwise: object) -> str:
        """Return the last error in one line: of the parser, the summary of the earlier ones."""
        return self._one(-1, otherwise)

    def _one(self, index: int, otherwise: object) -> str:
        """Return a message in one line; one of our plugin says more than any of TensorRT's."""
        plugin = [message for message in self._messages if message.startswith(_PLUGIN)]
        messages = plugin or self._messages
        return _shortened(messages[index] if messages else str(otherwise))


def _shortened(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"


_turn = threading.RLock()
"""Held while a call listens: Polygraphy's logger and standard output belong to all threads."""


@contextmanager
def polygraphy_log(verbosity: Verbosity) -> Iterator[ErrorLog]:
    """Send the messages of Polygraphy, and of TensorRT through it, to standard error.

    Threads come one after the other.

    Yields
    ------
    errors
        The errors so far.
    """
    from polygraphy.logger import G_LOGGER
    from polygraphy.logger import logger as polygraphy_logger

    polygraphy_logger.COLORED_MODULE_PRESENT = False  # else it advises to install one
    with _turn:
        errors, stream = ErrorLog(), logging.StreamHandler(sys.stderr)
        stream.setLevel(_LEVELS[verbosity])
        if verbosity != "verbose":  # the first error becomes the one line of an EngineError
            stream.addFilter(lambda record: record.levelno < logging.ERROR)
            stream.addFilter(lambda record: not any(n in record.getMessage() for n in _NOISE))
        logger = logging.getLogger("Polygraphy")
        before = logger.level, logger.propagate, G_LOGGER.use_python_logging_system
        logger.setLevel(1)
        logger.propagate = False
        for handler in (errors, stream):
            logger.addHandler(handler)
        G_LOGGER.use_python_logging_system = True
        severity = {"verbose": G_LOGGER.EXTRA_VERBOSE, "info": G_LOGGER.INFO}
        try:
            with (
                G_LOGGER.verbosity(severity.get(verbosity, G_LOGGER.WARNING)),
                redirect_stdout(sys.stderr),  # Polygraphy prints some advice
            ):
                yield errors
        finally:
            for handler in (errors, stream):
                logger.removeHandler(handler)
            level, logger.propagate, G_LOGGER.use_python_logging_system = before
            logger.setLevel(level)
