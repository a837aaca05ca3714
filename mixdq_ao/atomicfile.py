"""Atomic replacement of files: a file appears under its name complete and synced to disk, or not at all."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file next to ``path``. It replaces ``path`` when the block ends, and is deleted if the block
    raises. A symbolic link keeps pointing to its target, which is replaced; the mode of an existing file is kept.

    Raises OSError before the block if ``path`` exists and is not a regular file, for example a folder or a device.
    """
    if reason := _irregular(path):
        raise OSError(errno.EINVAL, reason, os.fspath(path))
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                with suppress(PermissionError):  # a file system without modes
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def obstacle(path: Path, *, is_file: bool | None = False) -> str | None:
    """The reason why ``path`` cannot be written, as text; None if none is known.

    ``is_file``: ``path`` is to become a file (True), a folder (False), or either (None).
    """
    if is_file is not False and not path.is_dir() and (reason := _irregular(path)):
        return reason
    known = path = Path(os.path.realpath(path)) if path.is_symlink() else path
    while not os.path.lexists(known) and known != known.parent:
        known = known.parent
    if not known.is_dir() and (is_file is False or known != path):
        return f"{known} is no folder"
    beside = known if known.is_dir() else known.parent
    return next((f"{place} is not writable" for place in (known, beside) if not os.access(place, os.W_OK)), None)


def _irregular(path: Path) -> str | None:
    """What ``path`` is, as text, if it is neither a regular file nor free; otherwise None."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    if stat.S_ISREG(mode):
        return None
    kind = "folder" if stat.S_ISDIR(mode) else "pipe, device or socket"
    return f"it is a {kind}, expected a file or a free name"


def sync(directory: Path) -> None:
    """Syncs a directory, so that renames in it survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
