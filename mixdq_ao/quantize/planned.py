"""Rounds a layer's weight as its plan says; real mode, fake mode and the search all take their codes from here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PlanError
from ..layer_plan import LayerPlan
from .quantizer import WeightQuant, quantize_weight


def quantize_planned(weight: Tensor, layer: LayerPlan, moment: Tensor | None) -> list[WeightQuant]:
    """Codes of ``weight`` [N, K] or [O, C, kh, kw]; one entry, or one for each half where the layer has a split.

    ``moment`` [K, K] or [C kh kw, C kh kw]: second moment of the input; each half uses its diagonal block.

    Raises:
        QuantizationError: the weight, the bits or the moment cannot be used.
    """
    parts = [weight] if layer.split is None else list(weight.tensor_split([layer.split], 1))
    quants, start = [], 0
    for part in parts:
        end = start + part[0].numel()
        quants.append(
            quantize_weight(
                part,
                layer.weight_bits,
                symmetric=layer.symmetric,
                weight_range=layer.weight_range,
                rounding=layer.rounding,
                moment=None if moment is None or not layer.needs_moment else moment[start:end, start:end],
            )
        )
        start = end
    return quants


def check_moment(moment: Tensor | None, layer: LayerPlan) -> None:
    """Raises PlanError unless ``layer`` has the moment it needs: square, finite, symmetric, with a nonnegative diagonal
    (of a moment on the meta device only the shape is checked)."""
    if not layer.needs_moment:
        return
    if moment is None:
        raise PlanError(
            f"{_asked(layer)}, but there is no second moment of its input; pass moments=input_moments(...) to "
            "mixdq_config, or plan 'minmax' or 'mse', and 'nearest'"
        )
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1] or not moment.is_floating_point():
        raise PlanError(
            f"{_asked(layer)}, but the second moment of its input is {moment.dtype} of shape {tuple(moment.shape)}, "
            "expected a square matrix of floating-point numbers"
        )
    if not moment.is_meta and not _is_moment(moment):
        raise PlanError(
            f"{_asked(layer)}, but the second moment of its input is not finite, not symmetric or has a negative "
            "diagonal; collect moments again"
        )


def check_moment_fits(moment: Tensor | None, layer: LayerPlan, weight: Tensor) -> None:
    """Raises PlanError unless the moment has the size of the inputs that ``weight`` multiplies."""
    if layer.needs_moment and moment is not None and len(moment) != weight[0].numel():
        raise PlanError(
            f"{_asked(layer)}, but the second moment of its input has {len(moment)} rows, expected "
            f"{weight[0].numel()}; collect moments of this model"
        )


def _asked(layer: LayerPlan) -> str:
    return f"weight_range is {layer.weight_range!r} and rounding {layer.rounding!r}"


def _is_moment(moment: Tensor) -> bool:
    """Whether a matrix can be a mean of x x^T, to rounding: symmetric with |M_ij| <= sqrt(M_ii M_jj). Checked in blocks
    of rows to save memory."""
    root = moment.diagonal().float().sqrt()
    if not bool(torch.isfinite(root).all()):  # NaN where the diagonal is negative
        return False
    for rows, columns, scale in zip(moment.split(1024), moment.T.split(1024), root.split(1024), strict=True):
        allowed = scale[:, None] * root
        close = (rows - columns).abs() <= 1e-3 * allowed
        if not bool((close & (rows.abs() <= 1.001 * allowed)).all()):
            return False
    return True
