"""Append-only files: locked against a second writer, and truncated back after a failed write."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from .errors import MixDQError


def open_locked(path: Path, error: type[MixDQError], busy: str) -> BinaryIO:
    """Opens ``path`` for appending, creating it if needed, and locks it until it is closed.

    Raises ``error`` if the file cannot be opened, or if another process holds the lock: the message then ends with
    ``busy``, which says what to do.
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
    """Writes ``data`` at the end and syncs it to disk. A partial write (OSError, as on a full disk) is removed."""
    end = file.seek(0, os.SEEK_END)
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        try:
            os.ftruncate(file.fileno(), end)
        except OSError:
            pass  # readers skip an incomplete last record
        raise
