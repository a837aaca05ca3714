"""Objects stored as JSON files: written atomically, and read with every field checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar, Self

from .errors import MixDQError
from .jsonfile import read_document, write_document


class Document:
    """Base of objects with ``to_json`` and ``from_json``, whose files begin with format and version."""

    __slots__ = ()
    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    ERROR: ClassVar[type[MixDQError]]
    metadata: Mapping[str, Any]

    def header(self) -> dict[str, Any]:
        """Format, version and metadata of every file. Raises ``ERROR`` if JSON cannot hold the metadata."""
        try:
            metadata = self._jsonable(self.metadata, "metadata")
        except RecursionError as e:
            raise self.ERROR("metadata is nested too deeply for a file; expected notes and figures") from e
        return {"format": self.FORMAT, "version": self.VERSION, "metadata": metadata}

    def _jsonable(self, value: Any, where: str) -> Any:
        """``value`` as JSON can hold it. Infinities and NaN, which measurements may give, become null, so that
        they never keep a finished search from being saved."""
        if isinstance(value, Mapping):
            return {str(k): self._jsonable(v, f"{where}[{k!r}]") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._jsonable(v, f"{where}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, float) and not isfinite(value):
            return None
        if value is None or isinstance(value, str | int | float):
            return value
        raise self.ERROR(f"{where} is a {type(value).__name__}, expected what JSON can hold")

    def __repr__(self) -> str:
        """Short, since there are hundreds of layers."""
        layers = getattr(self, "layers", None)
        return f"{type(self).__name__}({'' if layers is None else f'{len(layers)} layers'})"

    @classmethod
    def expect(cls, value: object, name: str) -> Self:
        """Returns ``value``, the argument called ``name``. Raises ``ERROR`` unless it is an instance of this class."""
        if not isinstance(value, cls):
            own = cls.__name__
            raise cls.ERROR(f"{name} is {value!r:.60}, expected a {own}; {own}.load(path) reads its file")
        return value

    def to_json(self) -> dict[str, Any]:
        """The whole file, header included."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """The object in a document whose header is right. Raises ``ERROR`` naming field, value and expectation."""
        raise NotImplementedError

    @classmethod
    def from_embedded(cls, document: object) -> Self:
        """The object in a document embedded in another one. Raises ``ERROR``, also if the header is wrong."""
        if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (
            cls.FORMAT,
            cls.VERSION,
        ):
            raise cls.ERROR(f"is no {cls.FORMAT} of version {cls.VERSION}")
        return cls.from_json(document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file written by ``save``. Raises ``ERROR`` naming the file, the field, its value and what was
        expected."""
        document = read_document(path, cls.FORMAT, cls.VERSION, cls.ERROR)
        try:
            return cls.from_json(document)
        except cls.ERROR as e:
            raise cls.ERROR(f"{os.fspath(path)}: {e}") from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file as JSON, atomically. Raises ``ERROR`` if it cannot be written."""
        document = self.to_json()
        try:
            write_document(path, document)
        except OSError as e:
            raise self.ERROR(f"{os.fspath(path)}: cannot be written: {e.strerror or e}") from e
