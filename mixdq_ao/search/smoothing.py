"""Chooses the smoothing factor of each channel of layers' inputs, and which inputs are rotated.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): dividing channel j of an input by s_j and multiplying the weights that
read it by s_j leaves the product unchanged. Here s_j are powers of two, so full precision stays the same to the bit.
``quantize.folds`` finds the places where the division folds into existing weights, and folds it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, QuantizationError
from ..models.outputs import denoised
from ..models.pipelines import Sampling, check_prompts, generate
from ..quantize.folds import Fold, Folding, as_smoothing, find_folds, fold_, folded, foldings_of, planned_folds
from ..quantize.hadamard import hadamard
from .calibration import Calibration
from .metrics import error_power
from .watch import denoiser_of, hooked, watched

LARGEST = 4
"""Largest exponent of two of a factor, positive or negative."""
SAME = 1e-8
"""Relative error power of the output, in float32 and wider types, above which folding is judged to have changed it."""


@torch.no_grad()
def choose_folds(
    model: nn.Module,
    go: Callable[[], object],
    *,
    strength: float | None,
    rotation: bool = False,
    folds: Sequence[Fold] | None = None,
) -> dict[Fold, Folding]:
    """Chooses smoothing factors and rotations for the inputs of the layers that ``go`` calls.

    s_j = max|x_j|^strength / max|w_j|^(1 - strength), over the calls and the reading layers, clamped to 1/16 to 16
    times its geometric mean, rounded to a power of two.

    Args:
        go: runs ``model`` on representative data.
        strength: see above; None for no smoothing.
        rotation: rotate attention values within heads where a Hadamard matrix of the head's size is known.
        folds: the places to fold at; None for all that are found.

    Raises:
        CalibrationError: strength is not between 0 and 1, or ``go`` does not call the model itself.
        QuantizationError: folding changes the model's output (its modules are not connected as ``find_folds`` expects).
            The weights are restored.
    """
    if strength is not None and not 0 <= strength <= 1:
        raise CalibrationError(f"smoothing is {strength}, expected 0 to 1, or None")
    peaks: dict[str, Tensor] = {}
    call: list[Any] = []
    folds = find_folds(model) if folds is None else list(folds)

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        peak = x.detach().abs().flatten(0, -2).amax(0).float()
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    with _first_call(model, call), watched(model, {fold.readers[0] for fold in folds}, see):
        go()
    if not call:
        raise CalibrationError(f"run= did not call {type(model).__name__} itself, which smoothing and rotation need")
    chosen = {f: _folding(model, f, peaks[f.readers[0]], strength, rotation) for f in folds if f.readers[0] in peaks}
    chosen = {fold: folding for fold, folding in chosen.items() if folding}
    _check_same(model, chosen, *call)
    return chosen


@contextmanager
def _first_call(model: nn.Module, call: list[Any]) -> Iterator[None]:
    """Appends the arguments and output of the model's first call inside the block to ``call``."""

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not call:
            call.extend((copy.deepcopy(args), copy.deepcopy(kwargs), denoised(output).clone()))

    with hooked(model.register_forward_hook(see, with_kwargs=True)):
        yield


def _check_same(model: nn.Module, folds: Mapping[Fold, Folding], args: Any, kwargs: Any, before: Tensor) -> None:
    with folded(model, folds):
        error = error_power(before, denoised(model(*args, **kwargs)))
    if not error <= max(SAME, (4 * torch.finfo(before.dtype).eps) ** 2):
        raise QuantizationError(
            f"smoothing or rotation changed the output of {type(model).__name__} by {error:.1e} of its power, expected "
            "none; this model's blocks are wired in another way than diffusers' own: calibrate without"
        )


def _folding(model: nn.Module, fold: Fold, peak: Tensor, strength: float | None, rotation: bool) -> Folding:
    powers = [] if strength is None else _powers(model, fold, peak, strength)
    rotates = rotation and fold.head is not None and fold.head > 1 and hadamard(fold.head) is not None
    return Folding(as_smoothing(powers) if any(powers) else None, fold.head if rotates else None)


def rotation_note(model: nn.Module, folds: Mapping[Fold, Folding]) -> str:
    """A text for metadata: which attentions are rotated, and why others are not."""
    heads = Counter(fold.head for fold in find_folds(model) if fold.head is not None)
    done = Counter(folding.rotation for folding in folds.values())
    notes = []
    for size, count in sorted(heads.items()):
        known = size > 1 and hadamard(size) is not None
        why = "" if known else " (no Hadamard matrix of that order is known)"
        notes.append(f"{done[size]} of {count} attentions with heads of {size} channels{why}")
    return "rotated: " + ("; ".join(notes) or "nothing, for no attention's values allow it")


def _powers(model: nn.Module, fold: Fold, peak: Tensor, strength: float) -> list[int]:
    """The exponent of two of each channel's factor; 0 where the channel or its weights are all zero."""
    weights: list[Any] = [model.get_submodule(r).weight for r in fold.readers]
    weight = torch.stack([w.detach().abs().amax(0).float() for w in weights]).amax(0)
    wanted = strength * peak.log2() - (1 - strength) * weight.log2()
    known = torch.isfinite(wanted)
    if not bool(known.any()):
        return [0] * len(peak)
    wanted = (wanted - wanted[known].mean()).clamp(-LARGEST, LARGEST)
    return torch.where(known, wanted, 0.0).round().int().tolist()


@contextmanager
def as_calibrated(model: nn.Module, calibration: Calibration) -> Iterator[Calibration]:
    """Folds the calibration's smoothing and rotation into ``model`` inside the block, and yields the calibration of the
    folded model; the weights are restored afterwards.

    Raises PlanError or QuantizationError where the model cannot be folded.
    """
    with folded(model, planned_folds(model, foldings_of(calibration.layers))):
        yield calibration.of_folded_model()


def smooth_(
    pipe: Any,
    prompts: Sequence[str],
    *,
    strength: float = 0.5,
    sampling: Sampling | None = None,
    folds: Sequence[Fold] | None = None,
) -> dict[Fold, Folding]:
    """Folds smoothing factors into the denoiser of ``pipe``, in place and for good: its weights change, its output does
    not. To record the smoothing in a plan for the original model use ``calibrate(smoothing=)`` instead.

    ``strength`` and errors: see ``choose_folds``. Returns what was folded.
    """
    model = denoiser_of(pipe)
    texts, drawn = check_prompts(prompts), sampling or Sampling()
    chosen = choose_folds(model, lambda: list(generate(pipe, texts, drawn, "latent")), strength=strength, folds=folds)
    fold_(model, chosen)
    return chosen
