"""Objects that are JSON files: written whole or not at all, read with every field checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar, Self

from .errors import MixDQError
from .jsonfile import read_document, write_document


class Document:
    """What has ``to_json`` and ``from_json``, as a file whose header is ``{"format": FORMAT, "version": VERSION}``."""

    __slots__ = ()
    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    ERROR: ClassVar[type[MixDQError]]
    metadata: Mapping[str, Any]

    def header(self) -> dict[str, Any]:
        """What every file begins with. Raises ``ERROR`` where the metadata hold what JSON cannot."""
        try:
            metadata = self._jsonable(self.metadata, "metadata")
        except RecursionError as e:
            raise self.ERROR("metadata is nested too deeply for a file; expected notes and figures") from e
        return {"format": self.FORMAT, "version": self.VERSION, "metadata": metadata}

    def _jsonable(self, value: Any, where: str) -> Any:
        """Metadata are notes and figures. Infinite ones, and those that could not be measured (NaN), are null in the
        file: no search is lost for them."""
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
        """Short: layers are many, and hold ranges, scores and figures by the dozen."""
        layers = getattr(self, "layers", None)
        return f"{type(self).__name__}({'' if layers is None else f'{len(layers)} layers'})"

    @classmethod
    def expect(cls, value: object, name: str) -> Self:
        """``value``, an argument of that name. Raises ``ERROR`` unless it is one of this class."""
        if not isinstance(value, cls):
            own = cls.__name__
            raise cls.ERROR(f"{name} is {value!r:.60}, expected a {own}; {own}.load(path) reads its file")
        return value

    def to_json(self) -> dict[str, Any]:
        """The whole file, header included."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """The object of a file whose header is right. Raises ``ERROR`` naming field, value and expectation."""
        raise NotImplementedError

    @classmethod
    def from_embedded(cls, document: object) -> Self:
        """The object of a document that is part of another. Raises ``ERROR``, also for another header."""
        if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (
            cls.FORMAT,
            cls.VERSION,
        ):
            raise cls.ERROR(f"is no {cls.FORMAT} of version {cls.VERSION}")
        return cls.from_json(document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file of ``save``. Raises the class's error naming the file, the field, its value and what was
        expected."""
        document = read_document(path, cls.FORMAT, cls.VERSION, cls.ERROR)
        try:
            return cls.from_json(document)
        except cls.ERROR as e:
            raise cls.ERROR(f"{os.fspath(path)}: {e}") from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file as JSON, atomically. Raises the class's error where it cannot be written."""
        document = self.to_json()
        try:
            write_document(path, document)
        except OSError as e:
            raise self.ERROR(f"{os.fspath(path)}: cannot be written: {e.strerror or e}") from e
