"""Reading and writing the project's JSON files: checked header, finite numbers only, atomic replacement."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from .atomicfile import replacing
from .errors import MixDQError
from .textfile import read_text

WRITTEN_BY = {
    "mixdq-plan": "mixdq allocate",
    "mixdq-calibration": "mixdq calibrate",
    "mixdq-sensitivity": "mixdq analyze",
    "mixdq-orthogonality": "mixdq analyze --metric orthogonality",
    "mixdq-temporal-plan": "mixdq schedule search",
    "mixdq-schedule-results": "mixdq schedule search --results",
    "mixdq-evaluation": "mixdq evaluate run",
    "mixdq-evaluation-run": "mixdq evaluate run",
    "mixdq-recovery": "mixdq recover --checkpoint",
}
"""{format: the command or function that writes it}, for error messages."""


def parse(text: str | bytes) -> Any:
    """A strict ``json.loads``. Raises ValueError also for NaN, infinity, numbers beyond float64, repeated keys and
    nesting deeper than Python can parse."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError as e:
        raise ValueError(f"nested too deeply: {e}") from e


def parse_object(text: str | bytes, where: str, error: type[MixDQError], hint: str = "") -> dict[str, Any]:
    """The JSON object in ``text``. Raises ``error``, its message between ``where`` and ``hint``, for anything else."""
    try:
        document = parse(text)
    except ValueError as e:
        raise error(f"{where}: not valid JSON ({str(e)[:200]}){hint}") from e
    if not isinstance(document, dict):
        raise error(f"{where}: is a {type(document).__name__}, expected an object{hint}")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is beyond float64")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"key {key!r} appears twice")
        document[key] = value
    return document


def read_object(path: str | os.PathLike[str], error: type[MixDQError], hint: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises ``error`` if the file cannot be read, is not JSON (see ``parse``) or holds
    something else; the message names the file and ends with ``hint``."""
    return parse_object(read_text(path, error, hint), os.fspath(path), error, hint)


def read_document(path: str | os.PathLike[str], kind: str, version: int, error: type[MixDQError]) -> dict[str, Any]:
    """The object in a JSON file with the header ``{"format": kind, "version": version}``.

    Raises ``error`` as ``read_object`` does, and for another header.
    """
    path = Path(path)
    writer = WRITTEN_BY.get(kind, "mixdq_ao")
    document = read_object(path, error, f"; expected a {kind} file, which {writer} writes")
    if document.get("format") != kind:
        raise error(f"{path}: {_format(document)}, expected {kind!r}; give a file that {writer} writes")
    if type(document.get("version")) is not int or document["version"] != version:
        raise error(
            f"{path}: version is {document.get('version')!r}, this release reads version {version}; "
            "upgrade mixdq-ao if the file is newer"
        )
    return document


def _format(document: dict[str, Any]) -> str:
    """The format that a file declares, and what writes such files."""
    if "format" not in document:
        return "has no format"
    found = document["format"]
    writer = WRITTEN_BY.get(found) if isinstance(found, str) else None
    return f"format is {found!r:.60}" + (f" (from {writer})" if writer else "")


def write_document(path: str | os.PathLike[str], document: dict[str, Any]) -> None:
    """Writes ``document`` so that a crash or a power cut leaves either the old file or the whole new one.

    Raises OSError, also for a name that no file can have and for more nesting than Python writes.
    """
    path = Path(path)
    if "\0" in os.fspath(path):
        raise OSError(errno.EINVAL, "its name holds a NUL character, expected none", os.fspath(path))
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except RecursionError as e:
        raise OSError(errno.EINVAL, "it is nested too deeply", os.fspath(path)) from e
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")
