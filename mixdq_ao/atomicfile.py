"""Files that appear under their name whole or not at all, and are on disk then, power cut or not."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A hidden file beside ``path`` to write to; it takes the place of ``path`` when the block ends, and goes where the
    block raises. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as file:
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
    known = path
    while not os.path.lexists(known) and known != known.parent:
        known = known.parent
    if not known.is_dir() and (is_file is False or known != path):
        return f"{known} is no folder"
    return None if os.access(known, os.W_OK) else f"{known} is not writable"


def sync(directory: Path) -> None:
    """New names of files in it are on disk when this returns."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
