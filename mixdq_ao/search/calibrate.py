"""Calibration: runs a model over real prompts and records the range of every layer's input."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CalibrationError
from ..expect import expect
from ..layer_plan import Range
from ..layers import find_layers, split_points, text_readers
from ..models.pipelines import Sampling, other_denoisers
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

BOS_RATIO = 4.0
"""A first row is handled as BOS when it is the same for every prompt and its peak at least this many times that of all
other rows. CLIP's is 50 to 80 times larger than the others; 4 is a threshold well below that, not a tuned one."""


class _Watch:
    """The observers of one layer's input."""

    def __init__(self, method: RangeMethod, split: int | None, text: bool) -> None:
        self.whole, self.split = RangeObserver(method), split
        self.halves = () if split is None else (RangeObserver(method), RangeObserver(method))
        self.prompt = RangeObserver(method) if text else None
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
        expect(act_bits in (8, 4), "act_bits", act_bits, "8 or 4", CalibrationError)
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
        self.text: Tensor | None = None
        self.saw_text = False

    @contextmanager
    def watch(self) -> Iterator[Calibrator]:
        """Observes every linear and convolution layer inside the block, which runs eagerly; hooks are removed at its
        end."""
        layers = find_layers(self.model)
        for name in layers:
            self.watches.setdefault(name, _Watch(self.method, self.splits.get(name), name in self.readers))
        handle = self.model.register_forward_pre_hook(self._take_text, with_kwargs=True)
        try:
            with watched(self.model, layers, self._see):
                yield self
        finally:
            handle.remove()
            self.text = None

    def _take_text(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the denoisers of diffusers call the text encoders' output; layers that are given it itself read it."""
        named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        text = named.get("encoder_hidden_states")
        self.text = text if isinstance(text, Tensor) and text.dim() == 3 else None
        self.saw_text |= self.text is not None

    @torch.no_grad()
    def _see(self, name: str, module: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        self.ties.see(name, x)
        watch = self.watches[name]
        if watch.whole.empty and isinstance(module, nn.Linear) and _same_memory(x, self.text):
            watch.prompt = watch.prompt or RangeObserver(self.method)
        if watch.prompt is not None and not self._is_text(x):
            watch.prompt = None
        if watch.prompt is not None and self.bos is not False:
            self._see_first_rows(x)
        watch.update(module, x, y, self.candidate)

    def _is_text(self, x: Tensor) -> bool:
        """Whether an input [batch, tokens, width] holds rows as wide as those of the first layer that read the text.
        Where text encoders differ in width, only the first one's rows count."""
        return x.dim() == 3 and (self.candidate is None or x.shape[-1] == len(self.candidate))

    def _see_first_rows(self, x: Tensor) -> None:
        """Compares the first row with earlier prompts' and updates the peaks of all rows. Rows of zeros (an empty
        negative prompt) are skipped."""
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
        if self.bos is True and not prompts:
            raise CalibrationError(f"bos=True, but {self._no_rows()}")
        if self.candidate is None or not prompts or self.bos is False:
            return None
        others = max(max(abs(p.lo), abs(p.hi)) for p in prompts)
        stands_out = self.candidate_holds and self.candidate.abs().max().item() >= BOS_RATIO * others
        if self.bos is True and not self.candidate_holds:
            raise CalibrationError("bos=True, but the first row of the text embedding differs between prompts")
        return tuple(self.candidate.tolist()) if stands_out or self.bos is True else None

    def _no_rows(self) -> str:
        if any(w.prompt is not None for w in self.watches.values()):
            return "the text embedding has no rows besides the first; give longer prompts"
        return (
            f"no linear layer of {type(self.model).__name__} is known to read the text embedding: none has the name of "
            "one, and none was given the model's encoder_hidden_states"
        )

    def _note(self, apart: bool) -> str | None:
        """A note for metadata on the rows of the text embedding; None if the model reads no text, or ``bos=False``."""
        if self.bos is False:
            return None
        peaks = self.row_peaks[self.row_peaks > 0]  # rows of zeros are padding
        if not len(peaks):
            return (
                None
                if not self.saw_text
                else "no layer is known to read the text embedding, so its first row was not looked at"
            )
        median = peaks.median().item()
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
    """Raises CalibrationError unless the layers of ``model`` are the original ones in full precision: their names say
    which read the text, and which read concatenated inputs."""
    for name, module in find_layers(model).items():
        if is_quantized(module.weight):
            raise CalibrationError(f"layer {name!r} is quantized already; calibrate the original model")
        if advice := adapter_advice(name):
            raise CalibrationError(advice)
    for name, module in model.named_modules():
        if advice := prepared_advice(name, module) or joint_advice(name, module):
            raise CalibrationError(advice)


def _same_memory(x: Tensor, y: Tensor | None) -> bool:
    """Whether two tensors are the same values at the same place, as a tensor and a view of all of it are."""
    if y is None or not y.data_ptr():  # some wrapper subclasses have no memory of their own
        return False
    return (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())


def calibrate_as_drawn(pipe: Any, prompts: Sequence[str], sampling: Sampling) -> Calibration:
    """The calibration of an analysis that was given none, on the prompts it draws. Raises as ``calibrate``."""
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
        pipe: a diffusers pipeline (its unet or transformer is observed); or any nn.Module, with ``run``. Compiled
            models run eagerly meanwhile.
        prompts: texts to draw; use real ones, as the ranges depend on them.
        steps: denoising steps, or several counts (a plan for 1 and 4 steps is calibrated with ``(1, 4)``).
        run: for a bare module, or in place of prompts: a callable that runs it on representative data.
        method: "minmax", "percentile" or "mse" (see RangeObserver.range).
        act_bits: 8 or 4, the bits that "mse" finds the best range for; the other methods' ranges serve both.
        bos: whether the first row of the text embedding is handled apart as the BOS row; None: where it is the same for
            every prompt and at least four times larger than all other rows.
        guidance_scale, batch_size, seed, height, width, frames: see Sampling.
        smoothing: 0 to 1, or None for none: outlier channels in inputs of transformer blocks are divided by powers of
            two, and the weights that read them multiplied; the number is the share of the range moved into the weights
            (0.5 is usual). Plans with this calibration record it, and ``quantize_`` applies it to the original model.
        rotation: rotate attention values within heads by Hadamard matrices, likewise.

        Smoothing or rotation runs everything twice: once to observe the channels, once with folded weights, which are
        restored.

    Raises:
        CalibrationError: method, act_bits or steps is not a valid choice; prompts and run are both given; the model is
            quantized or prepared for a schedule already, has an adapter, or its projections are fused; nothing ran, or
            an input holds NaN or infinity.
        MixDQError: prompts are empty.
        QuantizationError: smoothing or rotation changes the model's output.
    """
    model = model_of(pipe)
    calibrator = Calibrator(model, method, bos, act_bits)
    if others := other_denoisers(pipe):
        warnings.warn(
            f"{type(pipe).__name__} also denoises with {', '.join(others)}, which this does not calibrate; calibrate "
            f"it by itself: calibrate(pipe.{others[0]}, run=lambda: pipe(prompt, ...))",
            stacklevel=2,
        )
    go, metadata = runs(
        pipe, prompts, run, title="calibrating", steps=steps, guidance_scale=guidance_scale, seed=seed,
        batch_size=batch_size, height=height, width=width, frames=frames,
    )  # fmt: skip
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
