"""Saves and loads quantized models, bit for bit: safetensors and a config with the plan, no pickle.

    save_quantized(pipe.unet, "unet-w8a8")
    unet = load_quantized("unet-w8a8")

A directory holds ``config.json`` (the model's own config, and the plan under ``quantization_config``) and
``diffusion_pytorch_model.safetensors`` (``model.safetensors`` for a transformers model), sharded with an index if it is
large. ``save_pretrained`` of a quantized model writes the same format, and ``from_pretrained`` reads it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ..atomicfile import sync
from ..compat import uncompiled
from ..errors import CheckpointError
from ..jsonfile import write_document
from ..layers import find_layers
from ..plan import Plan
from ..plan_check import adapter_advice
from ..quantize.config import declare_quantized
from ..quantize.fake import FakeQuantizer
from ..quantize.tensor import is_quantized
from ..registration import METHOD
from ..tensorfile import write_safetensors
from .checkpoint import Checkpoint, read_json
from .declared import known_plan
from .diffusers_config import MixDQConfig
from .flatten import Flat, flatten
from .joint_names import without_joint
from .pipelines import inner_denoiser
from .plan_of import check_plan_of, plan_of
from .prepared_quantizer import check_saveable
from .skeleton import Library, check_fit, empty_model, fill, library_of, saved_config, without_aliases

CONFIG = "config.json"
INDEX = "model_index.json"
SHARD = 5_000_000_000  # bytes


def save_quantized(
    model: nn.Module, directory: str | os.PathLike[str], *, plan: Plan | None = None, max_shard_size: int = SHARD
) -> None:
    """Saves a quantized diffusers or transformers model.

    Weights are written under temporary names first, ``config.json`` last: a crash leaves the previous contents, or a
    directory that does not load, but never a mixture that loads. Tensors are written one by one, without a copy of all.

    Args:
        model: quantized by ``quantize_`` (real mode) or loaded; of a compiled one the model inside is saved.
        directory: created if missing. A directory with another model is refused.
        plan: the plan that quantized the model, to keep its exact ranges and metadata; it is checked against the
            tensors. By default the plan recorded on the model, or else read from the tensors.
        max_shard_size: bytes per file; a single weight is never divided.

    Raises:
        CheckpointError: the model cannot be saved so that it loads again, or a file cannot be written.
    """
    model = uncompiled(model)
    directory = Path(directory)
    library, flat, plan = _prepared(model, plan)
    refuse_foreign(directory)
    config = {**library.document, "quantization_config": MixDQConfig(plan).to_dict()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, library.stem, flat, config, max_shard_size)
    except OSError as e:
        raise CheckpointError(f"{directory}: cannot be written: {e.strerror or e}; make room and save again") from e


def _prepared(model: nn.Module, plan: Plan | None) -> tuple[Library, Flat, Plan]:
    """Everything to be written, after checking that it can be loaded again."""
    if any(adapter_advice(name) for name in find_layers(model)):
        raise CheckpointError(
            f"{type(model).__name__} has adapters; pipe.unload_lora_weights() before saving, after pipe.fuse_lora() "
            "where they are to stay"
        )
    check_saveable(model)
    library = saved_config(model)
    if any(isinstance(m, FakeQuantizer) for m in model.modules()):
        raise CheckpointError(f"{type(model).__name__} is quantized in fake mode; quantize it with mode='real' to save")
    if not any(is_quantized(m.weight) for m in find_layers(model).values()):
        raise CheckpointError(f"{type(model).__name__} holds no quantized layer; use its save_pretrained")
    state = without_joint(without_aliases(model))
    where = f"{type(model).__name__} in memory"
    check_fit(where, empty_model(Path(where), library), state)
    return library, flatten(state), plan_of(model, plan or known_plan(model))


def refuse_foreign(directory: Path) -> None:
    """Raises CheckpointError unless ``directory`` does not exist or is a directory without another model."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file, expected a directory or a free name")
    if (directory / INDEX).exists():
        raise CheckpointError(f"{directory}: holds a whole pipeline; give a directory of its own, or use save_pipeline")
    config = directory / CONFIG
    if config.exists() and not _is_ours(read_json(config)):
        raise CheckpointError(f"{directory}: holds another model, which is not overwritten; give another directory")


def _is_ours(document: dict[str, Any]) -> bool:
    quantization = document.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def _write(directory: Path, stem: str, flat: Flat, config: dict[str, Any], largest: int) -> None:
    shards = list(_shards(flat, largest))
    count = len(shards)
    names = [f"{stem}.safetensors"] if count == 1 else [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in _to(count)]
    index = directory / f"{stem}.safetensors.index.json"
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        for name, group in zip(names, shards, strict=True):
            keys = [key for n in group for key in flat.groups[n]]
            write_safetensors(Path(temporary) / name, {k: flat.tensors[k] for k in keys}, flat.metadata(group))
        if count > 1:
            places = {k: name for name, group in zip(names, shards, strict=True) for n in group for k in flat.groups[n]}
            size = sum(t.numel() * t.element_size() for t in flat.tensors.values())
            about = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            write_document(Path(temporary) / index.name, about)
            names.append(index.name)
        write_document(Path(temporary) / CONFIG, config)
        # From here until its last step the directory has no config.json, so that a partial save does not load.
        (directory / CONFIG).unlink(missing_ok=True)
        for old in (index, *(p for p in directory.iterdir() if _is_shard(p.name, stem))):
            old.unlink(missing_ok=True)
        for name in names:
            os.replace(Path(temporary) / name, directory / name)
        sync(directory)
        os.replace(Path(temporary) / CONFIG, directory / CONFIG)
    sync(directory)


def _to(count: int) -> range:
    return range(1, count + 1)


def _is_shard(name: str, stem: str) -> bool:
    return re.fullmatch(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors", name) is not None


def _shards(flat: Flat, largest: int) -> Iterator[list[str]]:
    """The state dict keys of each file, in order; the plain tensors of one weight stay together."""
    group: list[str] = []
    held = 0
    for name, keys in flat.groups.items():
        size = sum(flat.tensors[k].numel() * flat.tensors[k].element_size() for k in keys)
        if group and held + size > largest:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def load_quantized(directory: str | os.PathLike[str]) -> nn.Module:
    """Loads a model saved by ``save_quantized``, or by ``save_pretrained`` of a quantized model.

    The model is on the CPU, in evaluation mode, with every tensor as it was saved, to the bit. Weights are views of
    memory-mapped files, read when first used. Move the model with ``.to(device)``.

    Raises:
        CheckpointError: a file is missing, damaged, cut off, foreign, newer than this release, or does not fit the
            others; the message names it.
    """
    directory = Path(directory)
    if (directory / INDEX).exists():
        raise CheckpointError(
            f"{directory}: is a whole pipeline; load it with DiffusionPipeline.from_pretrained, or one of its parts"
        )
    path = directory / CONFIG
    if not path.exists():
        raise CheckpointError(f"{directory}: has no {CONFIG}; it is no saved model, or saving it did not end")
    document = read_json(path)
    if not _is_ours(document):
        raise CheckpointError(f"{path}: is not of a model quantized by mixdq_ao; load it with from_pretrained")
    plan = MixDQConfig.from_document(path, document["quantization_config"]).plan
    library = library_of(path, document)
    state = Checkpoint.in_directory(directory, library.stem).read()
    model = empty_model(path, library)
    check_fit(directory, model, state)
    check_plan_of(path, plan, state)
    fill(model, state)
    declare_quantized(model, plan)
    return model


def save_pipeline(pipe: Any, directory: str | os.PathLike[str], *, plan: Plan | None = None) -> None:
    """Saves a pipeline with quantized models; ``DiffusionPipeline.from_pretrained`` loads it.

    Unlike ``pipe.save_pretrained``, it checks every quantized model first, and the directory (or, in an existing empty
    directory, its index) appears only when everything is written. ``plan``: the plan of the denoiser, to keep its exact
    ranges and metadata.

    Raises:
        CheckpointError: the directory exists and is not empty, a part cannot be saved, or a file cannot be written.
    """
    directory = Path(directory)
    refuse_occupied(directory)
    main = inner_denoiser(pipe)
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model = uncompiled(model)
            _make_saveable(model, plan if model is main else None)
    try:
        _save_whole(pipe, Path(os.path.realpath(directory)))
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise CheckpointError(f"{directory}: cannot be written: {reason}; make room and save again") from e


def _save_whole(pipe: Any, directory: Path) -> None:
    """Saves into a temporary directory, then renames it to ``directory``. If that exists (it is empty, and may be a
    mount point or the current directory), moves the files into it instead, the index last."""
    exists = directory.exists()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory if exists else directory.parent, prefix=f".{directory.name}-"))
    try:
        pipe.save_pretrained(temporary)
        if not exists:
            temporary.chmod(0o755)
            os.replace(temporary, directory)
            return
        for part in sorted(temporary.iterdir(), key=lambda path: path.name == INDEX):
            os.replace(part, directory / part.name)
        temporary.rmdir()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_occupied(directory: Path) -> None:
    """Raises CheckpointError unless ``directory`` does not exist or is an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists; give a free name, so that no pipeline is half overwritten")


def _make_saveable(model: nn.Module, plan: Plan | None) -> None:
    check_saveable(model)
    if any(is_quantized(m.weight) for m in find_layers(model).values()):
        _, _, plan = _prepared(model, plan)
        declare_quantized(model, plan)
