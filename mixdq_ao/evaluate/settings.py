"""The settings of a run, stored with its pictures so that a directory never mixes pictures of different settings."""

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
"""Files of up to this many bytes are digested completely; larger ones by three samples of ``SAMPLE`` bytes."""
SAMPLE = 1 << 16
SHARED = ("prompts", "steps", "guidance_scale", "seed", "height", "width")
"""Settings that must be equal for the pictures of two runs to be compared pairwise."""

TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("pipeline", "content", "prompts", "dtype"), (str,)),
    **dict.fromkeys(("count", "steps", "seed"), (int,)),
    **dict.fromkeys(("height", "width"), (int, type(None))),
    "plan": (str, type(None)),
    "guidance_scale": (float, int),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that the pictures of a run depend on; batch size, shards, metrics and machine do not matter.

    Attributes:
        pipeline: its name or directory.
        content: distinguishes pipelines of the same name (see ``content_of``).
        plan: digest of the quantization plan, or None.
        prompts: digest of the prompts.
        count: number of prompts.
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
        """The sampling of ``count`` prompts from ``start`` on; a prompt's noise does not depend on the batch."""
        size = {"height": self.height, "width": self.width}
        return Sampling(
            steps=self.steps, guidance_scale=self.guidance_scale, seed=self.seed + start, batch_size=count, **size
        )


def digest(value: Any) -> str:
    """Digest of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def claim(directory: Path, settings: Settings) -> None:
    """Assigns ``directory`` to a run, or checks that it belongs to it. Raises MixDQError naming the difference."""
    path = directory / FILE
    occupied = directory.is_dir() and any(not _hidden(Path(p.name)) for p in directory.iterdir())
    if not path.exists():  # checked after listing: a shard that started meanwhile wrote FILE before anything else
        if occupied:
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
    """The settings of the run in a directory. Raises MixDQError if there is none."""
    path = directory / FILE
    document = read_document(path, FORMAT, VERSION, MixDQError)
    settings = document.get("settings")
    if not isinstance(settings, dict):
        raise MixDQError(f"{path}: settings is {type(settings).__name__}, expected an object")
    return Settings.from_json(path, settings)


def check_reference(directory: Path, reference: Settings, settings: Settings, prompts: Prompts) -> None:
    """Raises MixDQError unless each picture of a run corresponds to that of the same number in the reference.

    The reference may hold more pictures; ``prompts``, the run's and those that follow them, must then begin with the
    reference's prompts.
    """
    if reference.count < settings.count:
        raise MixDQError(f"{directory}: holds {reference.count} pictures, expected at least {settings.count}")
    for name in SHARED:
        a, b = getattr(reference, name), getattr(settings, name)
        if a != b and not (name == "prompts" and prompts.begins_with(reference.count, a)):
            more = "; give both the same prompts, of which fewer may be drawn here" if name == "prompts" else ""
            raise MixDQError(f"{directory}: {name} is {a!r} in the reference and {b!r} here, expected the same{more}")


def content_of(pipeline: str) -> str:
    """A digest of a pipeline's directory: names and sizes of its files, all bytes of small files, three samples of
    large ones. "" for a hub name."""
    root = Path(pipeline)
    if not root.is_dir():
        return ""
    files = sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root)))
    return digest_files((p.relative_to(root).as_posix(), p) for p in files)


def digest_files(files: Iterable[tuple[str, Path]]) -> str:
    """A digest of (name, path) pairs, in order: names and sizes, all bytes of small files, three samples of large ones.
    Raises MixDQError naming a file that cannot be read."""
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
