"""The kernel's locks of files, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

_NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What NFS without its lock service, 9p and some FUSE file systems answer."""


def lock(file: IO[Any], how: int) -> bool:
    """Lock an open file; whether its file system has locks.

    Parameters
    ----------
    how
        Of `fcntl.flock`.

    Raises
    ------
    BlockingIOError
        With ``LOCK_NB``: somebody else has it.
    OSError
        It cannot be locked for another reason.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in _NONE:
            return False
        raise
    return True
