"""Calibration: runs a model over real prompts and records the range of every layer's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CalibrationError
from ..layer_plan import Range
from ..layers import find_layers, split_points, text_readers
from ..models.pipelines import Sampling
from ..plan_check import adapter_advice, joint_advice, prepared_advice
from ..quantize.bos import bos_mask
from ..quantize.folds import Fold, Folding, folded
from ..quantize.tensor import is_quantized
from .calibration import Calibration, LayerCalibration
from .observe import RangeMethod, RangeObserver, check_method
from .runs import runs
from .smoothing import choose_folds, rotation_note
from .ties import Ties
from .watch import model_of, watched

# A first row is handled as BOS when it is the same for every prompt and this many times larger than all other rows.
BOS_RATIO = 4.0


class _Watch:
    """The observers of one layer's input."""

    def __init__(self, method: RangeMethod, split: int | None, text: bool) -> None:
        new = lambda: RangeObserver(method)  # noqa: E731
        self.whole, self.split = new(), split
        self.halves = () if split is None else (new(), new())
        self.prompt = new() if text else None
        self.act_size = self.macs = 0

    def update(self, module: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor, bos: Tensor | None) -> None:
        self.whole.update(x)
        if self.split is not None:
            for observer, half in zip(self.halves, x.tensor_split([self.split], x.dim() - 3), strict=True):
                observer.update(half)
        if self.prompt is not None:
            rows = x.flatten(0, -2)
            self.prompt.update(rows if bos is None else rows[~bos_mask(rows, bos)[:, 0]])
        samples = max(1, x.shape[0])
        self.act_size = max(self.act_size, x.numel() // samples)
        self.macs = max(self.macs, y.numel() // samples * module.weight[0].numel())


class Calibrator:
    """Watches a model while it runs. Use ``watch()``, run the model, then ``result()``.

    State is O(features): running ranges and one embedding row, never an input.

    Raises CalibrationError: see ``calibrate``.
    """

    def __init__(
        self, model: nn.Module, method: RangeMethod = "minmax", bos: bool | None = None, act_bits: int = 8
    ) -> None:
        check_method(method)
        if act_bits not in (8, 4):
            raise CalibrationError(f"act_bits is {act_bits!r}, expected 8 or 4")
        model = model_of(model)
        _check_original(model)
        self.model, self.bos = model, bos
        self.method: RangeMethod = method
        self.act_bits = act_bits
        self.splits, self.ties, self.readers = split_points(model), Ties(), text_readers(model)
        self.watches: dict[str, _Watch] = {}
        self.candidate: Tensor | None = None
        self.candidate_holds = True
        self.row_peaks = torch.zeros(0)

    @contextmanager
    def watch(self) -> Iterator[Calibrator]:
        """Observes every linear and convolution layer inside the block, which runs eagerly. All hooks are removed at
        its end."""
        layers = find_layers(self.model)
        for name in layers:
            self.watches.setdefault(name, _Watch(self.method, self.splits.get(name), name in self.readers))
        with watched(self.model, layers, self._see):
            yield self

    @torch.no_grad()
    def _see(self, name: str, module: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        self.ties.see(name, x)
        watch = self.watches[name]
        if watch.prompt is not None and not self._is_text(x):
            watch.prompt = None
        if watch.prompt is not None and self.bos is not False:
            self._see_first_rows(x)
        watch.update(module, x, y, self.candidate)

    def _is_text(self, x: Tensor) -> bool:
        """Whether an input [batch, tokens, width] has rows as the text's first layer saw them. Of several text encoders
        that differ in width, the first one's."""
        return x.dim() == 3 and (self.candidate is None or x.shape[-1] == len(self.candidate))

    def _see_first_rows(self, x: Tensor) -> None:
        """A BOS row is the same for every prompt; rows of zeros (an empty negative prompt) say nothing."""
        peaks = x.detach().abs().amax((0, 2)).float().cpu()
        length = max(len(peaks), len(self.row_peaks))
        self.row_peaks = torch.maximum(*(F.pad(p, (0, length - len(p))) for p in (peaks, self.row_peaks)))
        first = x[:, 0].detach().float()
        first = first[first.abs().amax(1) > 0]
        if self.candidate is None and len(first):
            self.candidate = first[0].clone()
        if self.candidate is not None and len(first):
            self.candidate_holds &= bool(bos_mask(first, self.candidate).all())

    def _embedding(self) -> tuple[float, ...] | None:
        prompts = [w.prompt for w in self.watches.values() if w.prompt is not None and not w.prompt.empty]
        if self.candidate is None or not prompts or self.bos is False:
            return None
        others = max(max(abs(p.lo), abs(p.hi)) for p in prompts)
        stands_out = self.candidate_holds and self.candidate.abs().max().item() >= BOS_RATIO * others
        if self.bos is True and not self.candidate_holds:
            raise CalibrationError("bos=True, but the first row of the text embedding differs between prompts")
        return tuple(self.candidate.tolist()) if stands_out or self.bos is True else None

    def _note(self, apart: bool) -> str | None:
        """What was found of the text's rows, in words; None where the model reads no text or was not to look."""
        if not len(self.row_peaks) or self.bos is False:
            return None
        median = max(self.row_peaks.median().item(), 1e-30)
        ratio = self.row_peaks[0].item() / median
        if apart:
            return f"first row set apart: the same for every prompt, its peak {ratio:.1f} times the median row's"
        row = int(self.row_peaks.argmax())
        highest = self.row_peaks[row].item() / median
        if highest < BOS_RATIO:
            return f"no row set apart: the highest peak, of row {row}, is {highest:.1f} times the median row's"
        why = "is not the first"
        if row == 0:
            same = f"is the same for every prompt, but less than {BOS_RATIO:g} times the largest of all others"
            why = same if self.candidate_holds else "differs between prompts"
        return (
            f"no row set apart, but row {row} is an outlier, its peak {highest:.1f} times the median row's, and {why}; "
            "keep the activations of the layers that read it at 16 bits if they suffer"
        )

    def result(self, metadata: Mapping[str, Any] | None = None) -> Calibration:
        """Ranges of the layers that ran, tied layers sharing theirs. Raises CalibrationError on NaN or infinity."""
        embedding = self._embedding()
        ran = {n: w for n, w in self.watches.items() if not w.whole.empty}
        if not ran:
            raise CalibrationError("no linear or convolution layer ran; run the model inside watch()")
        layers = {n: self._layer(n, w, embedding is not None) for n, w in ran.items()}
        ties = self.ties.groups()
        for tie in ties:
            for attribute in ("act_range", "prompt_range"):
                ranges = [r for n in tie if (r := getattr(layers[n], attribute)) is not None]
                joint = (min(r[0] for r in ranges), max(r[1] for r in ranges)) if ranges else None
                for n in tie:
                    if getattr(layers[n], attribute) is not None:
                        layers[n] = replace(layers[n], **{attribute: joint})
        note = self._note(embedding is not None)
        found = {"model": type(self.model).__name__} | ({} if note is None else {"text_rows": note})
        return Calibration(layers, ties, embedding, {**found, **(metadata or {})})

    def _layer(self, name: str, watch: _Watch, bos: bool) -> LayerCalibration:
        def checked(observer: RangeObserver) -> Range:
            lo, hi = observer.range(self.act_bits)
            if not (abs(lo) < float("inf") and abs(hi) < float("inf")):
                raise CalibrationError(f"layer {name!r}: its input holds NaN or infinity (range {lo} to {hi})")
            return lo, hi

        halves = watch.halves or (None, None)
        return LayerCalibration(
            act_range=checked(watch.whole),
            act_size=watch.act_size,
            macs=watch.macs,
            split=watch.split,
            first_range=None if halves[0] is None else checked(halves[0]),
            second_range=None if halves[1] is None else checked(halves[1]),
            prompt_range=checked(watch.prompt) if bos and watch.prompt is not None and not watch.prompt.empty else None,
        )


def _check_original(model: nn.Module) -> None:
    """Raises CalibrationError unless the layers of ``model`` are its own, in full precision: what layers read, and
    where inputs are concatenated, is known by their names."""
    for name, module in find_layers(model).items():
        if is_quantized(module.weight):
            raise CalibrationError(f"layer {name!r} is quantized already; calibrate the original model")
        if advice := adapter_advice(name):
            raise CalibrationError(advice)
    for name, module in model.named_modules():
        if advice := prepared_advice(name, module) or joint_advice(name, module):
            raise CalibrationError(advice)


def calibrate_as_drawn(pipe: Any, prompts: Sequence[str], sampling: Sampling) -> Calibration:
    """The ranges over what an analysis draws, for one that was given no calibration. Raises as ``calibrate``."""
    return calibrate(pipe, prompts, **asdict(sampling))


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    steps: int | Sequence[int] = 1,
    run: Callable[[], object] | None = None,
    method: RangeMethod = "minmax",
    act_bits: int = 8,
    bos: bool | None = None,
    guidance_scale: float = 0.0,
    batch_size: int = 16,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    smoothing: float | None = None,
    rotation: bool = False,
) -> Calibration:
    """Runs a model over prompts and records the range of every layer's input.

    Args:
        pipe: a diffusers pipeline (its unet or transformer is observed); or any nn.Module, with ``run``. What is
            compiled runs eagerly meanwhile.
        prompts: texts to draw. Real ones: ranges are only as good as they are.
        steps: denoising steps, or several counts (a plan for 1 and 4 steps is calibrated with ``(1, 4)``).
        run: for a bare module, or in the place of prompts: a callable that runs it on representative data.
        method: "minmax", "percentile" or "mse" (see RangeObserver.range).
        act_bits: 8 or 4, of the activations that "mse" looks for the best range of; the others give one for both.
        bos: True or False, or None to find out: the first text row is the same for every prompt and at least
            four times larger than all others.
        guidance_scale, batch_size, seed, height, width, frames: see Sampling.
        smoothing: 0 to 1, or None for none: channels that stand out in inputs of transformer blocks are made smaller by
            powers of two, and the weights that read them larger; this is the share of the difference that weights take
            over (0.5 is usual). Plans with this calibration say so, and ``quantize_`` does it to the original model.
        rotation: values of attention are rotated within heads by Hadamard matrices, likewise.

        Either runs everything twice: once to look at the channels, once with the weights changed (they are put back).

    Raises:
        CalibrationError: method, act_bits or steps is none of what is offered; prompts and run are both given; the
            model is quantized or prepared for a schedule already, has an adapter, or its projections are fused; nothing
            ran, or an input holds NaN or infinity.
        MixDQError: prompts are empty.
        QuantizationError: the model computes something else when smoothed or rotated.
    """
    model = model_of(pipe)
    calibrator = Calibrator(model, method, bos, act_bits)
    size = {"height": height, "width": width, "frames": frames}
    options = {"guidance_scale": guidance_scale, "batch_size": batch_size, "seed": seed, **size}
    go, metadata = runs(pipe, prompts, run, title="calibrating", steps=steps, **options)
    folds = _folds(model, go, smoothing, rotation)
    with folded(model, folds), calibrator.watch(), torch.no_grad():
        go()
    metadata |= {"method": method} | ({"act_bits": act_bits} if method == "mse" else {})
    metadata |= {} if smoothing is None else {"smoothing": smoothing}
    metadata |= {"rotation": rotation_note(model, folds)} if rotation else {}
    return _with_folds(calibrator.result(metadata), folds)


def _folds(model: nn.Module, go: Callable[[], object], smoothing: float | None, rotation: bool) -> dict[Fold, Folding]:
    if smoothing is None and not rotation:
        return {}
    return choose_folds(model, go, strength=smoothing, rotation=rotation)


def _with_folds(calibration: Calibration, folds: Mapping[Fold, Folding]) -> Calibration:
    readers = {reader: folding for fold, folding in folds.items() for reader in fold.readers}
    layers = {
        name: replace(layer, smoothing=readers[name].smoothing, rotation=readers[name].rotation)
        if name in readers
        else layer
        for name, layer in calibration.layers.items()
    }
    return replace(calibration, layers=layers)
