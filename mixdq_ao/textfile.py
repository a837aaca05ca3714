"""Reading text files that people write."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import MixDQError


def read_text(path: str | os.PathLike[str], error: type[MixDQError], hint: str = "") -> str:
    """The text of a file in UTF-8; a byte order mark is fine. Raises ``error``, naming the file and ending with
    ``hint``, where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise error(f"{os.fspath(path)}: cannot be read: {e.strerror or e}{hint}") from e
    except UnicodeDecodeError as e:
        raise error(f"{os.fspath(path)}: is not UTF-8 text (byte {e.start}){hint}") from e


def prompts_of(text: str, path: str | os.PathLike[str]) -> list[str]:
    """One prompt a line; blank lines are skipped. Raises MixDQError, naming the file ``text`` is of, for none."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise MixDQError(f"{os.fspath(path)}: holds no prompt, expected one a line")
    return prompts
