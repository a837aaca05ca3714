"""Stores a metric's rows of pictures in an append-only file that stays readable after a killed run.

The file is a line of JSON (format, version, subject, width, type), then records of one size: the number of the picture
(int64), its row, and a checksum of both (uint32); little-endian. An incomplete record at the end is cut off.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from ..appendfile import append, open_locked
from ..errors import MixDQError
from ..jsonfile import parse
from .metric import Rows

FORMAT, VERSION = "mixdq-rows", 1
TYPES = {"<f4", "<f8"}
WIDEST = 1 << 16
LONGEST_HEADER = 1 << 16  # bytes


class RowFile:
    """Rows by number of picture, one writer at a time; use as a context manager.

    Args:
        path: the file; created if it does not exist.
        subject: everything that the rows depend on, as JSON; opening a file of another subject raises MixDQError.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self.path, self.subject = path, dict(subject)
        self.rows: dict[int, np.ndarray] = {}
        self._file: BinaryIO | None = None
        self._dtype: np.dtype | None = None

    def __enter__(self) -> RowFile:
        self._file = open_locked(self.path, MixDQError, "another process writes to it; wait, or give each its --shard")
        try:
            self._file.seek(0)
            self._dtype, self.rows, end = _parse(self.path, self._file.read(), self.subject)
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, numbers: Sequence[int], rows: Rows) -> None:
        """Stores rows [B, width]; they are on disk when this returns. Raises MixDQError on a full disk; earlier rows
        stay readable."""
        assert self._file is not None
        dtype, header = self._dtype, b""
        if dtype is None:
            dtype = _record(rows.shape[1], rows.dtype.newbyteorder("<").str)
            header = _header(self.subject, rows.shape[1], dtype["row"].base.str)
        try:
            append(self._file, header + _pack(dtype, numbers, rows))
        except OSError as e:
            raise MixDQError(
                f"{self.path}: cannot be written: {e.strerror}; run the same command again once there is room"
            ) from e
        self._dtype = dtype
        self.rows.update(zip(numbers, rows, strict=True))


def read_rows(paths: Iterable[Path], subject: Mapping[str, Any]) -> dict[int, np.ndarray]:
    """{number of picture: row} of all files, which may still be written to. Raises MixDQError naming a file."""
    found: dict[int, np.ndarray] = {}
    for path in paths:
        found = _parse(path, path.read_bytes(), subject)[1] | found
    return found


def _record(width: int, kind: str) -> np.dtype:
    return np.dtype([("number", "<i8"), ("row", kind, (width,)), ("check", "<u4")])


def _header(subject: Mapping[str, Any], width: int, kind: str) -> bytes:
    fields = {"format": FORMAT, "version": VERSION, "subject": dict(subject), "width": width, "type": kind}
    return json.dumps(fields).encode() + b"\n"


def _pack(dtype: np.dtype, numbers: Sequence[int], rows: Rows) -> bytes:
    records = np.zeros(len(numbers), dtype)
    records["number"], records["row"] = numbers, rows
    records["check"] = [_check(r) for r in records]
    return records.tobytes()


def _check(record: np.void) -> int:
    return zlib.crc32(record["row"].tobytes(), zlib.crc32(record["number"].tobytes()))


def _parse(path: Path, data: bytes, subject: Mapping[str, Any]) -> tuple[np.dtype | None, dict[int, np.ndarray], int]:
    """Dtype of the records (None: no header yet), rows, and the offset at which the last complete record ends."""
    line, newline, _ = data.partition(b"\n")
    begun = json.dumps({"format": FORMAT, "version": VERSION, "subject": dict(subject)}).encode()[:-1]
    if not newline and len(line) < LONGEST_HEADER and (begun.startswith(line) or line.startswith(begun)):
        return None, {}, 0  # empty, or killed while its first line was written
    dtype = _read_header(path, line, subject)
    start = len(line) + 1
    whole = start + (len(data) - start) // dtype.itemsize * dtype.itemsize
    records = np.frombuffer(data[start:whole], dtype)
    for i, record in enumerate(records):
        if _check(record) != record["check"]:
            if i < len(records) - 1:
                raise MixDQError(
                    f"{path}: record {i} of {len(records)} is damaged; delete the file, its part is done anew"
                )
            whole, records = whole - dtype.itemsize, records[:-1]
    return dtype, {int(r["number"]): r["row"].copy() for r in records}, whole


def _read_header(path: Path, line: bytes, subject: Mapping[str, Any]) -> np.dtype:
    try:
        header = parse(line[:LONGEST_HEADER].decode())
    except ValueError as e:
        raise MixDQError(f"{path}: is no {FORMAT} file; choose another directory") from e
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise MixDQError(f"{path}: is no {FORMAT} file of version {VERSION}; choose another directory")
    width, kind = header.get("width"), header.get("type")
    if type(width) is not int or not 1 <= width <= WIDEST or kind not in TYPES:
        raise MixDQError(
            f"{path}: width is {width!r} and type {kind!r}, expected 1 to {WIDEST} and one of {sorted(TYPES)}"
        )
    if header.get("subject") != dict(subject):
        raise MixDQError(
            f"{path}: holds rows of {_short(header.get('subject'))}, expected {_short(dict(subject))}; "
            "choose another directory, or delete the file"
        )
    return _record(width, kind)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
