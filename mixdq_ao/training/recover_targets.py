"""Training targets: the denoiser's inputs along full-precision trajectories, and its outputs for them.

Each sample is one call of the denoiser for one prompt. float32 tensors are stored in float16 if their values fit, and
the model runs on the rounded values while they are recorded, so the outputs belong exactly to the stored inputs.
Arguments that do not change along a trajectory (the text embedding, by far the largest) are stored once per prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MixDQError
from ..models.outputs import denoised
from ..models.pipelines import Sampling, denoiser, generate
from ..progress import progress

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Path = tuple[Any, ...]
"""Identifies an argument: its position or name, then the keys of nested dicts."""
LARGEST_HALF = 65504.0
AT_ONCE = 1 << 20
"""Number of output values converted to float64 at a time."""


@dataclass(slots=True)
class Field:
    """The recorded values of one tensor argument.

    Attributes:
        pool: the distinct rows; if ``rows`` is None, the one value for all samples.
        rows: [n], the index of each sample's row in the pool.
        dtype: of the argument in the call.
    """

    pool: Tensor
    rows: Tensor | None
    dtype: torch.dtype

    def of(self, samples: Tensor, device: torch.device) -> Tensor:
        chosen = self.pool if self.rows is None else self.pool[self.rows[samples]]
        return chosen.to(device=device, dtype=self.dtype)


@dataclass(slots=True)
class Targets:
    """Recorded calls.

    Attributes:
        fields: {path of an argument: Field}.
        constants: {path: value} of the arguments that are not tensors.
        outputs: [n, ...], the outputs in full precision.
        spans: for each number of denoising steps, the (first, end) of its samples.
        power: mean square of the outputs.
    """

    fields: dict[Path, Field]
    constants: dict[Path, Any]
    outputs: Tensor
    spans: list[tuple[int, int]]
    power: float = field(init=False)

    def __post_init__(self) -> None:
        parts = self.outputs.flatten().split(AT_ONCE)
        self.power = sum(part.double().square().sum().item() for part in parts) / max(self.outputs.numel(), 1)

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        tensors = [self.outputs, *(t for f in self.fields.values() for t in (f.pool, f.rows) if t is not None)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def batch(self, samples: Tensor, device: torch.device) -> tuple[Arguments, Tensor]:
        """Arguments of a call for the samples with these indices, and the target outputs."""
        values = {path: field.of(samples, device) for path, field in self.fields.items()} | self.constants
        return nested_arguments(values), self.outputs[samples].to(device)

    def choose(self, step: int, size: int, seed: int) -> Tensor:
        """Indices of the samples of one optimizer step: equal shares for each number of denoising steps, every share in
        random order without repetition until all samples were used. Depends only on its arguments."""
        shares = [size // len(self.spans) + (i < size % len(self.spans)) for i in range(len(self.spans))]
        chosen = [
            _turn(end - start, step * n, n, seed) + start for (start, end), n in zip(self.spans, shares, strict=True)
        ]
        return torch.cat(chosen)


def _turn(count: int, position: int, size: int, seed: int) -> Tensor:
    """``size`` indices below ``count``, from ``position`` on in an endless sequence of random permutations."""
    epochs = range(position // count, (position + size - 1) // count + 1)
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + e)) for e in epochs]
    start = position - epochs[0] * count
    return torch.cat(orders)[start : start + size]


def record(
    pipe: Any,
    prompts: Sequence[str],
    *,
    trajectory: Sequence[int],
    seed: int,
    guidance_scale: float = 0.0,
    batch_size: int = 16,
    size: Mapping[str, int | None] | None = None,
    title: str = "recording",
) -> Targets:
    """Generates ``prompts`` with each number of steps in ``trajectory``, from different noise, and records all calls of
    the denoiser.

    ``size``: height, width and frames, see Sampling.

    Raises:
        MixDQError: a call of the denoiser cannot be stored; names the argument.
    """
    recorder = _Recorder(denoiser(pipe))
    spans = []
    with progress(title, len(prompts) * len(trajectory)) as bar, recorder.watch():
        for i, steps in enumerate(trajectory):
            start = recorder.count
            noise: dict[str, Any] = {"seed": seed + i * len(prompts), "guidance_scale": guidance_scale, **(size or {})}
            sampling = Sampling(steps=steps, batch_size=batch_size, **noise)
            for latents in generate(pipe, prompts, sampling, "latent"):
                bar.advance(len(latents))
            spans.append((start, recorder.count))
    return recorder.targets(spans)


class _Recorder:
    """A forward pre-hook that stores a denoiser's inputs and rounds them to the stored values, and a forward hook that
    stores its outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.count = model, 0
        self.pools: dict[Path, list[Tensor]] = {}
        self.rows: dict[Path, list[Tensor]] = {}
        self.dtypes: dict[Path, torch.dtype] = {}
        self.constants: dict[Path, Any] | None = None
        self.outputs: list[Tensor] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Records the calls inside the block."""
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        with before, self.model.register_forward_hook(self._after):  # each handle removes its hook
            yield

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        values = flat_arguments(args, kwargs)
        size = next((len(v) for v in values.values() if isinstance(v, Tensor) and v.dim() > 0), 0)
        constants = {path: v for path, v in values.items() if not isinstance(v, Tensor)}
        if self.constants is not None and (
            self.constants != constants or set(self.pools) != set(values) - set(constants)
        ):
            raise MixDQError(
                f"{type(module).__name__} is called in different ways within a trajectory; cannot record it"
            )
        self.constants = constants
        for path, value in values.items():
            if isinstance(value, Tensor):
                value = (
                    value.expand(size) if value.dim() == 0 else value
                )  # a timestep: batches mix samples with different ones
                values[path] = self._keep(path, value.detach(), size)
        self.count += size
        return nested_arguments(values)

    def _keep(self, path: Path, value: Tensor, size: int) -> Tensor:
        """Stores a value; returns the stored value, in the original dtype."""
        stored = _compact(value)
        kept, pool = stored.cpu(), self.pools.setdefault(path, [])
        self.dtypes[path] = value.dtype
        again = bool(pool) and pool[-1].dtype == kept.dtype and torch.equal(pool[-1], kept)
        if len(value) != size:
            if pool and not again:
                raise MixDQError(
                    f"argument {_named(path)} has {len(value)} rows for {size} samples and changes between calls"
                )
            self.pools[path] = [kept]
            return stored.to(value.dtype)
        rows = self.rows.setdefault(path, [])
        if again:
            rows.append(rows[-1])
        else:
            before = sum(len(p) for p in pool)
            pool.append(kept)
            rows.append(torch.arange(before, before + size))
        return stored.to(value.dtype)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs.append(denoised(output).detach().cpu())

    def targets(self, spans: list[tuple[int, int]]) -> Targets:
        fields = {
            path: Field(_joined(pool), torch.cat(self.rows[path]) if path in self.rows else None, self.dtypes[path])
            for path, pool in self.pools.items()
        }
        return Targets(fields, self.constants or {}, torch.cat(self.outputs), spans)


def _joined(pool: list[Tensor]) -> Tensor:
    """Rows in one dtype: the wider one, if some values did not fit float16."""
    widest = max((p.dtype for p in pool), key=lambda d: d.itemsize)
    return torch.cat([p.to(widest) for p in pool])


def _compact(value: Tensor) -> Tensor:
    if value.dtype is not torch.float32 or not bool((value.abs() <= LARGEST_HALF).all()):
        return value
    return value.to(torch.float16)


def flat_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Path, Any]:
    """{path: value} of all arguments, nested dicts flattened."""
    flat: dict[Path, Any] = {}

    def visit(path: Path, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit((*path, key), inner)
        else:
            flat[path] = value

    for place, value in [*enumerate(args), *kwargs.items()]:
        visit((place,), value)
    return flat


def nested_arguments(values: Mapping[Path, Any]) -> Arguments:
    """The inverse of ``flat_arguments``."""
    kwargs: dict[Any, Any] = {}
    for path, value in values.items():
        place = kwargs
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    args = [kwargs.pop(i) for i in sorted(k for k in kwargs if isinstance(k, int))]
    return tuple(args), kwargs


def _named(path: Path) -> str:
    return ".".join(map(str, path))
