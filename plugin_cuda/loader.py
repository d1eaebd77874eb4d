"""Shared libraries of plugin_cuda, opened by ctypes and checked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from plugin_cuda.errors import PluginError


@lru_cache
def load(
    path: Path, prefix: str, version: int, declare: Callable[[ctypes.CDLL], None], remedy: str
) -> ctypes.CDLL:
    """Open a library; needs no GPU.

    Parameters
    ----------
    path
        The library, resolved.
    prefix
        Of its functions; ``<prefix>_version`` says its version.
    version
        The one that the binding was written for.
    declare
        Gives the functions their types.
    remedy
        What to do where there is no such file.

    Raises
    ------
    PluginError
        When it is missing, cannot be loaded or is of another version.
    """
    if not path.is_file():
        raise PluginError(f"{path} not found: {remedy}")
    try:
        library = ctypes.CDLL(str(path))
        of_version = getattr(library, f"{prefix}_version")
        of_version.argtypes, of_version.restype = (), ctypes.c_int32
        found = of_version()
        if found == version:
            declare(library)
    except (OSError, AttributeError) as error:
        raise PluginError(
            f"{path} is no lib{prefix}.so that can be loaded ({error}); build it with build-plugin"
        ) from error
    if found != version:
        raise PluginError(
            f"{path} is of version {found}, this binding of {version}: build it again with "
            "build-plugin"
        )
    return library
