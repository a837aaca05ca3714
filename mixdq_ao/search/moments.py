"""Second moments of layers' inputs, collected while a model runs over real prompts, for compensated rounding."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CalibrationError
from ..layers import find_layers
from ..quantize.bos import bos_mask
from .calibration import Calibration
from .moments_file import fingerprint_of, read_moments, write_moments
from .runs import runs
from .ties import MOST
from .watch import model_of, watched

ROWS_AT_ONCE = 4096
"""Unfolded windows of a convolution in memory at a time."""


class Moments(Mapping[str, Tensor]):
    """{layer: mean of x x^T over its inputs}, float32 [K, K] on the CPU; K is the number of weights of an output
    channel, in the order of ``weight.flatten(1)``. Layers that read the same tensor share one matrix.

    Attributes:
        matrices: the matrices by layer; layers that share a matrix have the same object.
        metadata: model class, number of prompts, sampling.
    """

    def __init__(self, matrices: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        self.matrices, self.metadata = dict(matrices), dict(metadata or {})
        for name, matrix in self.matrices.items():
            if matrix.dtype != torch.float32 or matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
                raise CalibrationError(
                    f"layer {name!r}: its second moment is {matrix.dtype} of shape {tuple(matrix.shape)}, expected "
                    "float32, square"
                )

    def __getitem__(self, name: str) -> Tensor:
        return self.matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    def __repr__(self) -> str:
        return f"Moments({len(self)} layers, {self.bytes / 2**20:.1f} MiB)"

    @property
    def bytes(self) -> int:
        """Memory of the matrices, shared ones counted once."""
        return sum(4 * m.numel() for m in {id(m): m for m in self.matrices.values()}.values())

    @property
    def fingerprint(self) -> str:
        """A hash of the matrices, which differs for other prompts, models or layers."""
        return fingerprint_of(self.matrices)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, atomically. Raises CalibrationError where it cannot be written."""
        write_moments(path, self.matrices, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Reads a file of ``save``; matrices stay on disk until they are used. Raises CalibrationError naming the
        file, the layer and what was expected. That the numbers are a moment's is checked when they are used."""
        return cls(*read_moments(path))


class _Deviated(Exception):
    """Layers that read the same tensor in one call read different tensors in another."""


class Collector:
    """Sums x x^T of layers' inputs while a model runs. Use ``watch()``, run the model, then ``matrices()``.

    State: one float32 [K, K] matrix for each set of layers that read the same tensor in the same way.

    Args:
        calibration: says which layers handle BOS rows apart; these rows are left out.
        share: whether layers that read the same tensor share a matrix.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], calibration: Calibration, share: bool = True) -> None:
        self.model, self.layers, self.share = model, list(layers), share
        self.apart = {n for n in self.layers if calibration.layers[n].prompt_range is not None}
        self.bos = calibration.bos_tensor()
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.owners: dict[str, str] = {}
        self.last: dict[int, tuple[weakref.ref[Tensor], dict[tuple[object, ...], str]]] = {}

    @contextmanager
    def watch(self) -> Iterator[Collector]:
        """Observes the layers inside the block; all hooks are removed at its end."""
        with watched(self.model, self.layers, self._see):
            yield self

    @torch.no_grad()
    def _see(self, name: str, module: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        owner = self._owner(name, module, x)
        if self.owners.setdefault(name, owner) != owner:
            raise _Deviated
        if owner == name:
            self._add(name, module, x.detach())

    def _owner(self, name: str, module: nn.Linear | nn.Conv2d, x: Tensor) -> str:
        """The first layer that read this tensor object in the same way; a weak reference tells a live tensor from a
        reused address."""
        if not self.share:
            return name
        version = 0 if x.is_inference() else x._version
        how = (version, name in self.apart, *_geometry(module))
        known = self.last.get(id(x))
        if known is None or known[0]() is not x:
            if len(self.last) > MOST:
                self.last = {k: v for k, v in self.last.items() if v[0]() is not None}
            known = self.last[id(x)] = weakref.ref(x), {}
        return known[1].setdefault(how, name)

    def _add(self, name: str, module: nn.Linear | nn.Conv2d, x: Tensor) -> None:
        for rows in input_rows(module, x):
            if name in self.apart and self.bos is not None:
                rows = rows[~bos_mask(rows, self.bos.to(rows.device))[:, 0]]
            rows = rows.float()
            if name not in self.sums:
                self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.sums[name].addmm_(rows.T, rows)
            self.counts[name] = self.counts.get(name, 0) + len(rows)

    def matrices(self) -> dict[str, Tensor]:
        """{layer: mean of x x^T} for the layers that ran; frees the sums. Raises CalibrationError where an input holds
        NaN or infinity, or nothing ran."""
        if any(self.calls[name] != self.calls[owner] for name, owner in self.owners.items()):
            raise _Deviated
        means: dict[str, Tensor] = {}
        for name in list(self.sums):
            mean = self.sums.pop(name).div_(max(self.counts[name], 1)).cpu()
            if not bool(torch.isfinite(mean.diagonal()).all()):
                raise CalibrationError(f"layer {name!r}: its input holds NaN or infinity, or values beyond 1e18")
            means[name] = mean
        if not means:
            raise CalibrationError("none of the layers ran; give layers that the prompts use, or run the model")
        return {name: means[self.owners[name]] for name in self.layers if name in self.owners}


def input_rows(module: nn.Linear | nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """The rows [n, K] of input ``x`` that a layer's weight (flattened to [N, K]) multiplies: input rows of a linear
    layer; unfolded windows of a convolution, zero padding included, some samples at a time."""
    if isinstance(module, nn.Linear):
        yield x.reshape(-1, x.shape[-1])
        return
    x = x if x.dim() == 4 else x[None]
    kernel, dilation, padding, stride = _geometry(module)
    for part in x.split(max(1, ROWS_AT_ONCE // max(1, x.shape[-1] * x.shape[-2]))):
        windows = F.unfold(part.float(), kernel, dilation, padding, stride)
        yield windows.transpose(1, 2).reshape(-1, windows.shape[1])


def _geometry(module: nn.Linear | nn.Conv2d) -> tuple[Any, ...]:
    if isinstance(module, nn.Linear):
        return ()
    return module.kernel_size, module.dilation, module.padding, module.stride


def input_moments(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    calibration: Calibration,
    steps: int | Sequence[int] = 1,
    run: Callable[[], object] | None = None,
    layers: Iterable[str] | None = None,
    guidance_scale: float = 0.0,
    batch_size: int = 16,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> Moments:
    """Runs a model over prompts and collects the second moment of every layer's input.

    Memory: 4 K^2 bytes for a layer of K inputs per output (K = channels times kernel area for convolutions), once for
    layers that read the same tensor. With ``layers`` a large model can be processed in groups, each with its own plan
    and ``quantize_``; a group collected after others are quantized sees the inputs of the quantized model.

    Args:
        pipe, prompts, steps, run, guidance_scale, batch_size, seed, height, width, frames: as for ``calibrate``.
            ``run`` may be called twice.
        calibration: of the same model; says which layers handle BOS rows apart, which are left out here.
        layers: names of layers; None for all calibrated ones that can use a moment (no grouped convolutions).

    Raises:
        CalibrationError: a name is unknown or not calibrated, steps is not a count or several, nothing ran, or an input
            holds NaN or infinity.
    """
    model = model_of(pipe)
    names = _names(model, Calibration.expect(calibration, "calibration"), layers)
    go, drawn = runs(
        pipe, prompts, run, title="collecting moments", steps=steps, guidance_scale=guidance_scale, seed=seed,
        batch_size=batch_size, height=height, width=width, frames=frames,
    )  # fmt: skip
    settings = {"model": type(model).__name__, **drawn}
    try:
        return Moments(_collect(Collector(model, names, calibration), go), settings)
    except _Deviated:
        return Moments(_collect(Collector(model, names, calibration, share=False), go), settings)


@torch.no_grad()
def _collect(collector: Collector, go: Callable[[], object]) -> dict[str, Tensor]:
    with collector.watch():
        go()
    return collector.matrices()


def _names(model: nn.Module, calibration: Calibration, layers: Iterable[str] | None) -> list[str]:
    found = find_layers(model)
    grouped = {n for n, m in found.items() if isinstance(m, nn.Conv2d) and m.groups != 1}
    if layers is None:
        return [n for n in found if n in calibration.layers and n not in grouped]
    if isinstance(layers, str):
        raise CalibrationError(f"layers is the text {layers!r}, expected names of layers")
    names = list(layers)
    for name in names:
        if name not in found or name not in calibration.layers:
            missing = (
                "a layer of the calibration" if name in found else f"a linear or convolution layer of {_kind(model)}"
            )
            raise CalibrationError(f"layers names {name!r}, which is not {missing}")
        if name in grouped:
            raise CalibrationError(f"layers names {name!r}, a convolution in groups, whose rounding needs no moment")
    return names


def _kind(model: nn.Module) -> str:
    return type(model).__name__
