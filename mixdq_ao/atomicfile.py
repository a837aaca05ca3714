"""Files that appear under their name whole or not at all, and are on disk then, power cut or not."""

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
    """A hidden file beside ``path`` to write to; it takes the place of ``path`` when the block ends, and goes where the
    block raises. Of a link the file it leads to is replaced. An old file's mode stays.

    Raises OSError, before the block where ``path`` is no regular file, as a folder or a device.
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
    """In words, what would keep a file from being written to ``path``; or a folder (``is_file`` False), or either
    (None). None where nothing is known to."""
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
    """In words, what ``path`` is where it is neither a file nor a free name."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    if stat.S_ISREG(mode):
        return None
    kind = "folder" if stat.S_ISDIR(mode) else "pipe, device or socket"
    return f"it is a {kind}, expected a file or a free name"


def sync(directory: Path) -> None:
    """New names of files in it are on disk when this returns."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
