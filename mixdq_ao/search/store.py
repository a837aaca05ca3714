"""An append-only file of measurements, from which a killed run continues without losing or repeating any.

One JSON object a line. The first line is the header: format, version, and the fingerprint of everything the results
depend on. A torn last line (power cut, full disk, kill -9) is dropped by the reader and truncated before appending. One
process writes to a file; several machines write a file each, and these are merged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..appendfile import append, open_locked
from ..errors import SensitivityError
from ..expect import is_number
from ..jsonfile import parse_object
from .sensitivity import ERROR_FLOOR

FORMAT, VERSION = "mixdq-store", 1


SAME = 1e-2
"""Relative difference between two machines' results of one evaluation that is put down to their arithmetic; results
below ``ERROR_FLOOR`` may differ by any factor."""


class Store:
    """Results by key, in a file (or only in memory with ``path=None``). One writer at a time.

    Use as a context manager: the file is locked inside the block. A value is a dict of finite numbers.

    Raises:
        SensitivityError: the file is not a store, belongs to another run (fingerprint), is being written by another
            process, or cannot be written (a full disk: earlier results stay readable).
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint
        self.results: dict[str, dict[str, float]] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Store:
        if self.path is None:
            return self
        if self.path.exists() and not self.path.is_file():
            raise SensitivityError(f"{self.path}: is not a regular file, expected a path for a store")
        self._file = open_locked(
            self.path, SensitivityError, "another process is writing to this store; wait or use another file"
        )
        try:
            self._load(self._file)
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

    def _load(self, file: BinaryIO) -> None:
        file.seek(0)
        data = file.read()
        whole = self._take(data)
        if whole < len(data):
            file.truncate(whole)
        if not whole:
            self._append(self._header)

    @property
    def _header(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}

    def _take(self, data: bytes) -> int:
        """Adds the results in a file's content; returns the offset where its last whole line ends. Raises where the
        first line, whole or torn, is not a header of this run, so that no other file is written to."""
        whole = data.rfind(b"\n") + 1
        if not whole:
            if not json.dumps(self._header).encode().startswith(data):
                raise SensitivityError(
                    f"{self.path}: not a {FORMAT} file of this run; choose another file or delete it"
                )
            return 0
        lines = data[:whole].splitlines()
        self._check_header(_parse(lines[0], self.path, 1))
        for number, line in enumerate(lines[1:], 2):
            record = _parse(line, self.path, number)
            key, value = record.get("key"), record.get("value")
            if not isinstance(key, str) or not isinstance(value, dict) or not _are_figures(value):
                raise SensitivityError(f"{self.path}: line {number}: expected a key and a value of finite numbers")
            self.results[key] = value
        return whole

    def _check_header(self, header: Mapping[str, Any]) -> None:
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise SensitivityError(f"{self.path}: not a {FORMAT} file of version {VERSION}; choose another file")
        if header.get("fingerprint") != self.fingerprint:
            raise SensitivityError(
                f"{self.path}: holds results of another model, other prompts or other settings "
                f"(fingerprint {header.get('fingerprint')}, expected {self.fingerprint}); "
                "choose another file or delete it"
            )

    def merge(self, paths: Iterable[str | os.PathLike[str]]) -> int:
        """Copies the results of other stores of the same run, which may still be written to and are not changed.

        Where both have a result, this store's stays. Returns the number of new results.

        Raises:
            SensitivityError: a file cannot be read, is not a store or of another run, or has a result that contradicts
                the one here; nothing of that file is copied.
        """
        count = 0
        for path in map(Path, paths):
            found = self._read(path)
            for key in found.keys() & self.results.keys():
                _check_same(path, key, found[key], self.results[key])
            new = {key: value for key, value in found.items() if key not in self.results}
            if new:
                self._append(*({"key": key, "value": value} for key, value in new.items()))
                self.results |= new
            count += len(new)
        return count

    def _read(self, path: Path) -> dict[str, dict[str, float]]:
        """The results in another file, which is not changed; a torn last line is skipped."""
        other = Store(path, self.fingerprint)
        if not path.is_file():
            raise SensitivityError(f"{path}: is no file, expected a store to merge")
        try:
            data = path.read_bytes()
        except OSError as e:
            raise SensitivityError(f"{path}: cannot be read: {e.strerror}") from e
        other._take(data)
        return other.results

    def get(self, key: str) -> dict[str, float] | None:
        """The stored result, or None."""
        return self.results.get(key)

    def put(self, key: str, value: Mapping[str, float]) -> None:
        """Stores a result; it is on disk when this returns."""
        self._append({"key": key, "value": dict(value)})
        self.results[key] = dict(value)

    def _append(self, *records: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            append(self._file, b"".join(json.dumps(r, allow_nan=False).encode() + b"\n" for r in records))
        except OSError as e:
            raise SensitivityError(
                f"{self.path}: cannot be written: {e.strerror}; {len(self.results)} results are safe, "
                "run the same command again once there is room"
            ) from e


def _parse(line: bytes, path: Path | None, number: int) -> dict[str, Any]:
    return parse_object(line, f"{path}: line {number}", SensitivityError, f"; expected a {FORMAT} file")


def _are_figures(value: Mapping[str, object]) -> bool:
    return bool(value) and all(map(is_number, value.values()))


def _check_same(path: Path, key: str, theirs: Mapping[str, float], ours: Mapping[str, float]) -> None:
    floor = ERROR_FLOOR * ours.get("power", 1.0)  # error powers are relative, or of an output of that power
    if theirs.keys() != ours.keys() or not all(
        math.isclose(theirs[n], ours[n], rel_tol=SAME, abs_tol=floor) for n in ours
    ):
        raise SensitivityError(
            f"{path}: {key!r} is {dict(theirs)}, this store has {dict(ours)}; one was made by other software or by "
            "a faulty machine: delete the wrong one"
        )
