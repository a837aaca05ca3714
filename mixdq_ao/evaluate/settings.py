"""What the pictures of a run depend on, written beside them, so that a directory never holds pictures of two kinds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import MixDQError
from ..jsonfile import read_document, write_document
from ..models.pipelines import Sampling
from .prompts import Prompts

FORMAT, VERSION = "mixdq-evaluation-run", 1
FILE = "run.json"
WHOLE = 1 << 20
"""Bytes of a file up to which all of it enters a digest; of larger ones three samples do."""
SAMPLE = 1 << 16
SHARED = ("prompts", "steps", "guidance_scale", "seed", "height", "width")
"""What two runs must have in common for their pictures to be compared one by one."""

TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("pipeline", "content", "prompts", "dtype"), (str,)),
    **dict.fromkeys(("count", "steps", "seed"), (int,)),
    **dict.fromkeys(("height", "width"), (int, type(None))),
    "plan": (str, type(None)),
    "guidance_scale": (float, int),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the pictures of a run depend on. Batch size, shards, metrics and machine are none of it.

    Attributes:
        pipeline: its name or directory; ``content``: what tells it from another under that name.
        plan: digest of the plan it was quantized by; None for none.
        prompts: digest of the ``count`` prompts that are drawn.
        steps, guidance_scale, seed, height, width: see ``Sampling``.
        dtype: of the weights.
    """

    pipeline: str
    content: str = ""
    plan: str | None = None
    prompts: str
    count: int
    steps: int
    guidance_scale: float
    seed: int
    height: int | None = None
    width: int | None = None
    dtype: str

    @classmethod
    def from_json(cls, path: Path, document: Mapping[str, Any]) -> Settings:
        names = {f.name for f in fields(cls)}
        if set(document) != names:
            wrong = min(names ^ set(document))
            raise MixDQError(
                f"{path}: {wrong!r} is {'missing' if wrong in names else 'unknown'}; expected {sorted(names)}"
            )
        for name, kinds in TYPES.items():
            if type(document[name]) not in kinds:
                raise MixDQError(f"{path}: {name} is {document[name]!r:.60}, expected {kinds[0].__name__}")
        return cls(**document)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        return digest(self.to_json())

    def sampling(self, start: int, count: int) -> Sampling:
        """For prompts ``start`` to ``start + count`` at once: each from its own noise, whatever the batch."""
        size = {"height": self.height, "width": self.width}
        return Sampling(
            steps=self.steps, guidance_scale=self.guidance_scale, seed=self.seed + start, batch_size=count, **size
        )


def digest(value: Any) -> str:
    """Of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def claim(directory: Path, settings: Settings) -> None:
    """Makes ``directory`` the place of the run, or checks that it is. Raises MixDQError naming what differs."""
    path = directory / FILE
    if not path.exists():
        strange = directory.is_dir() and any(not _hidden(Path(p.name)) for p in directory.iterdir())
        if strange and not path.exists():  # not a shard that began beside this one
            raise MixDQError(f"{directory}: is not empty and holds no {FILE}; give a free name")
        write_document(path, {"format": FORMAT, "version": VERSION, "settings": settings.to_json()})
    found = settings_of(directory).to_json()
    for name, value in settings.to_json().items():
        if found[name] != value:
            raise MixDQError(
                f"{path}: {name} is {found[name]!r} there and {value!r} here; give another directory, or the same "
                "settings"
            )


def settings_of(directory: Path) -> Settings:
    """Of the run in a directory. Raises MixDQError where there is none."""
    path = directory / FILE
    document = read_document(path, FORMAT, VERSION, MixDQError)
    settings = document.get("settings")
    if not isinstance(settings, dict):
        raise MixDQError(f"{path}: settings is {type(settings).__name__}, expected an object")
    return Settings.from_json(path, settings)


def check_reference(directory: Path, reference: Settings, settings: Settings, prompts: Prompts) -> None:
    """Raises MixDQError unless each picture of a run belongs to that of its number in the reference, which may hold
    more: ``prompts``, those of the run and what follows them, are then told from others by their first."""
    if reference.count < settings.count:
        raise MixDQError(f"{directory}: holds {reference.count} pictures, expected at least {settings.count}")
    for name in SHARED:
        a, b = getattr(reference, name), getattr(settings, name)
        if a != b and not (name == "prompts" and prompts.begins_with(reference.count, a)):
            more = "; give both the same prompts, of which fewer may be drawn here" if name == "prompts" else ""
            raise MixDQError(f"{directory}: {name} is {a!r} in the reference and {b!r} here, expected the same{more}")


def content_of(pipeline: str) -> str:
    """What tells a pipeline's directory from another of its name: names and sizes of its files, all bytes of small
    files, three samples of large ones. "" for a name on the hub."""
    root = Path(pipeline)
    if not root.is_dir():
        return ""
    files = sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root)))
    return digest_files((p.relative_to(root).as_posix(), p) for p in files)


def digest_files(files: Iterable[tuple[str, Path]]) -> str:
    """Of files under names, in order: names and sizes, all bytes of small files, three samples of large ones. Raises
    MixDQError naming a file that cannot be read."""
    found = hashlib.blake2b(digest_size=16)
    for name, path in files:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                found.update(f"{name} {size}\n".encode(errors="surrogatepass"))
                for start in (0,) if size <= WHOLE else (0, size // 2, size - SAMPLE):
                    file.seek(start)
                    found.update(file.read(size if size <= WHOLE else SAMPLE))
        except OSError as e:
            raise MixDQError(f"{path}: cannot be read: {e.strerror or e}; expected a file that can be") from e
    return found.hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
