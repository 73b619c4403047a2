"""Turns errors of the file system into what happened and what a user can do."""

import errno
import os

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    **dict.fromkeys(_FULL, "free some space"),
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "mount that file system for writing",
    errno.EACCES: "make it writable",
    errno.EPERM: "let this user change it (see lsattr: it may be immutable)",
    errno.ENOENT: "put it back",
    errno.ENOTDIR: "put the folder back",
    errno.ENAMETOOLONG: "give shorter names",
    errno.EIO: "see to the disk",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
}


def remedy(number: int | None) -> str:
    """What to do when the file system gave this errno."""
    return _REMEDIES.get(number or 0, "see to that")


def reason(number: int) -> str:
    """What the file system said, in a few words."""
    return "disk full" if number in _FULL else os.strerror(number).lower()


def line(error: OSError) -> str:
    """One line: the path, what went wrong, and what to do."""
    what = error.strerror or str(error)
    return f"{error.filename or 'disk'}: {what}: {remedy(error.errno)}"
