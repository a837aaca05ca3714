"""Reads the prompts of common benchmarks: COCO captions, MJHQ-30K, a text file, or a file of a data set on the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MixDQError
from ..jsonfile import parse
from ..textfile import prompts_of, read_text

EXPECTED = "COCO's captions_*.json, MJHQ-30K's meta_data.json, or a text file with one prompt a line"
HUB_FILE = "meta_data.json"
"""File of a data set that is named without one, such as playgroundai/MJHQ-30K."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts in the order of their file.

    Attributes:
        texts: one prompt per picture to generate.
        files: name of the real picture of each prompt; None if the file has none.
        kind: "COCO", "MJHQ" or "text".
    """

    texts: tuple[str, ...]
    files: tuple[str, ...] | None
    kind: str

    def first(self, count: int | None) -> Prompts:
        """The first ``count`` prompts, or all if None. Raises MixDQError if there are fewer."""
        if count is None:
            return self
        if not 1 <= count <= len(self.texts):
            raise MixDQError(f"count is {count}, expected 1 to {len(self.texts)}, the number of prompts")
        return Prompts(self.texts[:count], None if self.files is None else self.files[:count], self.kind)

    @property
    def digest(self) -> str:
        """Digest of the texts, in order."""
        return hashlib.blake2b(json.dumps(self.texts).encode(), digest_size=16).hexdigest()

    def begins_with(self, count: int, digest: str) -> bool:
        """Whether the first ``count`` prompts have this ``digest``."""
        return count <= len(self.texts) and self.first(count).digest == digest


def read_prompts(source: str | Path) -> Prompts:
    """Reads a file, or ``org/dataset`` or ``org/dataset:path/in/it.json`` on the hub.

    - COCO: the first caption of every picture, pictures in the order of their first caption (as the released MixDQ
      reads them).
    - MJHQ-30K: the prompt of every picture, in order.
    - text: one a line, UTF-8; blank lines are skipped.

    Raises MixDQError naming the file and the entry.
    """
    path = _local(str(source))
    text = read_text(path, MixDQError, f"; expected {EXPECTED}")
    if path.suffix != ".json":
        return Prompts(tuple(prompts_of(text, path)), None, "text")
    try:
        document = parse(text)
    except ValueError as e:
        raise MixDQError(f"{path}: not valid JSON ({e}); expected {EXPECTED}") from e
    if not isinstance(document, dict) or not document:
        raise MixDQError(f"{path}: is {type(document).__name__}, expected {EXPECTED}")
    read: Callable[[Path, dict[str, Any]], Prompts] = _from_coco if "annotations" in document else _from_mjhq
    return read(path, document)


def _local(source: str) -> Path:
    """The path of the file, after downloading it if it is on the hub."""
    name, _, file = source.partition(":")
    local = Path(source).exists() or Path(name).suffix in (".json", ".txt")
    if local or not re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", source):
        return Path(source)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file or HUB_FILE, repo_type="dataset"))
    except Exception as e:  # of many classes, by network and server
        raise MixDQError(
            f"{source}: is no file, and {file or HUB_FILE} of the data set {name} cannot be had from the hub "
            f"({' '.join(str(e).split())[:120]}); expected {EXPECTED}"
        ) from e


def _from_coco(path: Path, document: dict[str, Any]) -> Prompts:
    names = _picture_names(path, document)
    annotations = document["annotations"]
    if not isinstance(annotations, list) or not annotations:
        raise MixDQError(f"{path}: annotations is {type(annotations).__name__}, expected a list that is not empty")
    captions: dict[int, str] = {}
    for i, entry in enumerate(annotations):
        where = f"{path}: annotations[{i}]"
        if not isinstance(entry, dict) or type(entry.get("image_id")) is not int:
            raise MixDQError(f"{where}: has no whole number 'image_id'; expected COCO's captions_*.json")
        captions.setdefault(entry["image_id"], _text(where, "caption", entry.get("caption")))
    missing = next((i for i in captions if i not in names), None) if names else None
    if missing is not None:
        raise MixDQError(f"{path}: picture {missing} has a caption and is not in images; the file is cut")
    files = tuple(names[i] for i in captions) if names else None
    return Prompts(tuple(captions.values()), files, "COCO")


def _picture_names(path: Path, document: dict[str, Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    images = document.get("images", [])
    if not isinstance(images, list):
        raise MixDQError(f"{path}: images is {type(images).__name__}, expected a list")
    for i, entry in enumerate(images):
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not _plain(entry.get("file_name")):
            raise MixDQError(f"{path}: images[{i}]: expected a whole number 'id' and a 'file_name'")
        names[entry["id"]] = entry["file_name"]
    return names


def _from_mjhq(path: Path, document: dict[str, Any]) -> Prompts:
    texts, files = [], []
    for name, entry in document.items():
        where = f"{path}: {name[:40]!r}"
        if not isinstance(entry, dict) or not _plain(entry.get("category")) or not _plain(name):
            raise MixDQError(f"{where}: is no entry with 'category' and 'prompt'; expected {EXPECTED}")
        texts.append(_text(where, "prompt", entry.get("prompt")))
        files.append(f"{entry['category']}/{name}.jpg")
    return Prompts(tuple(texts), tuple(files), "MJHQ")


def _text(where: str, field: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise MixDQError(f"{where}: {field} is {value!r:.60}, expected a text that is not empty")
    return value.strip()


def _plain(name: object) -> bool:
    """Whether this is a file name that stays inside the directory."""
    return isinstance(name, str) and bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
