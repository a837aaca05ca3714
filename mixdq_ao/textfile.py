"""Reading text files written by people."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import MixDQError


def read_text(path: str | os.PathLike[str], error: type[MixDQError], hint: str = "") -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises ``error`` if it cannot be read; the message
    names the file and ends with ``hint``."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise error(f"{os.fspath(path)}: cannot be read: {e.strerror or e}{hint}") from e
    except UnicodeDecodeError as e:
        raise error(f"{os.fspath(path)}: is not UTF-8 text (byte {e.start}){hint}") from e


def prompts_of(text: str, path: str | os.PathLike[str]) -> list[str]:
    """The prompts in ``text``, one per line, blank lines apart. Raises MixDQError naming ``path`` if there is none."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise MixDQError(f"{os.fspath(path)}: holds no prompt, expected one a line")
    return prompts
