"""A file that one process at a time appends to, and that a failed write leaves as it was."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from .errors import MixDQError


def open_locked(path: Path, error: type[MixDQError], busy: str) -> BinaryIO:
    """The file, made where it does not exist, locked until it is closed.

    Raises ``error`` where it cannot be opened, or is locked already: then ``busy`` says what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    except OSError as e:
        raise error(f"{path}: cannot be opened for writing: {e.strerror}") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.close()
        raise error(f"{path}: {busy}") from e
    return file


def append(file: BinaryIO, data: bytes) -> None:
    """Adds ``data`` at the end; it is on disk when this returns. OSError (a full disk): what was written is cut off."""
    end = file.seek(0, os.SEEK_END)
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        try:
            os.ftruncate(file.fileno(), end)
        except OSError:
            pass  # the reader drops what is torn
        raise
