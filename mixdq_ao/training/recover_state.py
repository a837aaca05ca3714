"""Checkpoints of a training run, from which it continues after kill -9 as if it had not been killed; no pickle.

A directory holds ``run.json`` and the safetensors file that it names. Tensors are written under a new name, then the
JSON is replaced atomically, then the old tensors are deleted: a crash leaves the old state or the new one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer
from torchao.optim.subclass_8bit import OptimState8bit

from ..atomicfile import obstacle
from ..errors import CheckpointError, OptimizerError
from ..jsonfile import read_document, write_document
from ..tensorfile import read_header, write_safetensors
from .moments import BLOCK

FORMAT, VERSION, FILE = "mixdq-recovery", 1, "run.json"
OLD = r"\.?state-\d+\.safetensors"
"""Matches the start of tensor files' names, and of temporary files that a killed run left."""


@dataclass(slots=True)
class Progress:
    """The state of a run besides its tensors.

    Attributes:
        step: number of optimizer steps done.
        seconds, core_seconds: time spent on them; the latter summed over all processor cores.
        best, best_step: smallest error on held-out prompts, and the step after which it was measured.
        smooth, least: running mean of the loss, and its minimum; None before the first step.
        history: {"step", "error", "loss"} of each measurement.
        stopped: why the run ended early, or None.
    """

    step: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    smooth: float | None = None
    least: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "best": None if math.isinf(self.best) else self.best}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Progress:
        """Raises ValueError saying which field is wrong."""
        if set(document) != set(cls.__slots__):
            raise ValueError(f"expected exactly {', '.join(cls.__slots__)}")
        for name in ("step", "best_step"):
            _expect(type(document[name]) is int and document[name] >= 0, name, document[name])
        for name in ("seconds", "core_seconds"):
            _expect(_is_amount(document[name]), name, document[name])
        for name in ("best", "smooth", "least"):
            _expect(document[name] is None or _is_amount(document[name]), name, document[name])
        _expect(document["stopped"] is None or isinstance(document["stopped"], str), "stopped", document["stopped"])
        history = document["history"]
        rows = isinstance(history, list) and all(isinstance(h, dict) and set(h) == KEYS for h in history)
        _expect(
            rows and all(_is_amount(v) for h in history for v in h.values()), "history", "not a list of measurements"
        )
        return cls(**{**document, "best": math.inf if document["best"] is None else document["best"]})


KEYS = {"step", "error", "loss"}


def _is_amount(value: object) -> bool:
    return type(value) in (int, float) and value >= 0  # type: ignore[operator]


def _expect(condition: bool, name: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}")


def check_directory(directory: Path) -> None:
    """Raises CheckpointError if the directory cannot hold a run (below a file, or a model's own folder); called before
    any work."""
    if reason := obstacle(directory):
        raise CheckpointError(f"{directory}: cannot be written, {reason}; choose another checkpoint")
    for name in ("model_index.json", "config.json"):
        if (directory / name).exists():
            raise CheckpointError(
                f"{directory}: holds a model ({name}), expected a folder for the run alone; choose another checkpoint"
            )


def save_run(
    directory: Path,
    progress: Progress,
    tensors: Mapping[str, Tensor],
    fingerprint: str,
    recipe: Mapping[str, Any],
) -> None:
    """Writes a checkpoint. ``recipe`` is stored so that the error of another run in the directory can say what differs.

    Raises CheckpointError if it cannot be written; the previous checkpoint is still intact then.
    """
    name = f"state-{progress.step}.safetensors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_safetensors(directory / name, tensors, {"fingerprint": fingerprint, "step": str(progress.step)})
        document = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, "tensors": name}
        document["recipe"] = dict(recipe)
        write_document(directory / FILE, {**document, "progress": progress.to_json()})
        for old in directory.iterdir():
            if old.name != name and re.match(OLD, old.name):
                old.unlink(missing_ok=True)
    except OSError as e:
        raise CheckpointError(f"{directory}: cannot be written: {e.strerror or e}; make room and run again") from e


def load_run(
    directory: Path, fingerprint: str, recipe: Mapping[str, Any], shapes: Mapping[str, torch.Size]
) -> tuple[Progress, dict[str, Tensor]] | None:
    """Reads the checkpoint of ``save_run``; None if there is none yet.

    Args:
        shapes: {name: shape} of the required float32 tensors; those under ``optimizer/`` are not checked here.

    Raises:
        CheckpointError: the checkpoint is damaged, of another run or of other shapes; names the file and tensor.
    """
    path = directory / FILE
    if not path.exists():
        return None
    document = read_document(path, FORMAT, VERSION, CheckpointError)
    if document.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path}: is of another {_difference(document.get('recipe'), recipe)}; "
            "give another directory, or delete this one"
        )
    try:
        progress = Progress.from_json(document.get("progress", {}))
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{path}: progress: {e}; delete the directory to start anew") from e
    name = document.get("tensors")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{path}: tensors is {name!r}, expected a safetensors file beside it")
    return progress, _tensors(directory / name, fingerprint, progress.step, shapes)


def _difference(stored: Any, recipe: Mapping[str, Any]) -> str:
    """Says how a stored run may differ from the requested one, by their recipes."""
    if not isinstance(stored, dict):
        return "release of mixdq_ao, model, plan, prompts or options"
    names = sorted(n for n in {*stored, *recipe} if stored.get(n) != recipe.get(n))
    if not names:
        return "model, plan, prompts, moments, optimizer or release of mixdq_ao"
    changed = "run: " + ", ".join(f"{n} was {stored.get(n)!r} there and is {recipe.get(n)!r} now" for n in names)
    return changed + (" (a run cannot be lengthened, its learning rate falls over all steps)" * ("steps" in names))


def _tensors(path: Path, fingerprint: str, step: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    header = read_header(path)
    if (header.metadata.get("fingerprint"), header.metadata.get("step")) != (fingerprint, str(step)):
        raise CheckpointError(f"{path}: is not the file {FILE} was written with; delete the directory to start anew")
    own = {n for n in header.tensors if not n.startswith("optimizer/")}
    for name in sorted(own ^ set(shapes)):
        where = "is missing" if name in shapes else "belongs to no parameter of this model"
        raise CheckpointError(f"{path}: {name!r} {where}; was it written for another model or plan?")
    for name, shape in shapes.items():
        stored = header.tensors[name]
        if stored.dtype is not torch.float32 or stored.shape != tuple(shape):
            raise CheckpointError(
                f"{path}: {name!r} is {stored.dtype} of shape {list(stored.shape)}, expected float32 of {list(shape)}"
            )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in header.tensors}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}; delete the directory to start anew") from e


def optimizer_tensors(optimizer: Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; ``names`` are in the order of its parameters."""
    tensors: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            place = f"optimizer/{names[index]}/{key}"
            if isinstance(value, OptimState8bit):
                tensors |= {f"{place}.codes": value.codes, f"{place}.scale": value.scale}
                tensors[f"{place}.qmap"] = value.qmap
            elif isinstance(value, Tensor):
                tensors[place] = value
            else:
                raise OptimizerError(f"{place}: is a {type(value).__name__}, only tensors can be kept in a checkpoint")
    return tensors


def load_optimizer(optimizer: Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Loads the state from ``optimizer_tensors``; hyperparameters stay as they are.

    Raises:
        CheckpointError: state of unknown parameters.
        OptimizerError: the state does not fit the optimizer.
    """
    places = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for place, value in tensors.items():
        name, _, key = place.removeprefix("optimizer/").rpartition("/")
        if name not in places:
            raise CheckpointError(f"{place!r} belongs to no parameter; was it written for another model or plan?")
        state.setdefault(places[name], {})[key] = value
    for entries in state.values():
        for key in [k.removesuffix(".codes") for k in entries if k.endswith(".codes")]:
            entries[key] = _blocks(key, [entries.pop(f"{key}.{part}", None) for part in ("codes", "scale", "qmap")])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _blocks(key: str, parts: list[Tensor | None]) -> OptimState8bit:
    types = [torch.uint8, torch.float32, torch.float32]
    codes, scale, qmap = parts
    if codes is None or scale is None or qmap is None or [p.dtype for p in (codes, scale, qmap)] != types:
        raise CheckpointError(f"optimizer state {key!r}: expected codes in uint8, scale and qmap in float32")
    if codes.numel() != BLOCK * scale.numel() or scale.dim() != 1 or qmap.shape != (256,):
        raise CheckpointError(f"optimizer state {key!r}: codes, scale and qmap do not fit each other")
    return OptimState8bit(codes, scale, qmap, bool((qmap < 0).any()), dtype=torch.float32)
