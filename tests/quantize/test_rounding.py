"""Searched ranges and compensated rounding, against plain float64 formulas, and never worse than the default."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixdq_ao import QuantizationError
from mixdq_ao.quantize import compensate
from mixdq_ao.quantize.compensate import DAMPING, Compensation, compensated_codes
from mixdq_ao.quantize.grid import minmax_grid
from mixdq_ao.quantize.quantizer import quantize_weight

KINDS = [(8, True), (4, True), (4, False), (2, True), (2, False)]
SHAPES = [(5, 7), (1, 1), (6, 3, 3, 3), (3, 130), (9, 1)]


def moment_of(length: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """The second moment of correlated inputs of very different magnitudes, like activations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(length, rank or length, generator=generator) / length**0.5
    x = torch.randn(400, rank or length, generator=generator) @ mix.T + 0.3
    x = x * torch.logspace(-1, 1, length)[torch.randperm(length, generator=generator)]
    return x.T @ x / len(x)


def error(weight: Tensor, moment: Tensor | None, bits: int, **how: Any) -> Tensor:
    """The error [N] of a rounded weight: d M d^T, or the sum of squares without a moment; float64."""
    d = (quantize_weight(weight, bits, moment=moment, **how).dequantize().double() - weight.double()).flatten(1)
    return ((d if moment is None else d @ moment.double()) * d).sum(1)


def reference_codes(row: np.ndarray, scale: float, zero: float, top: tuple[int, int], moment: np.ndarray) -> np.ndarray:
    """One row of GPTQ in the form of optimal brain quantization (section 3 of arXiv 2210.17323): the inverse over the
    remaining columns is updated after every column, without a Cholesky factor."""
    h = moment / moment.diagonal().mean()
    h = h + DAMPING * np.eye(len(h))
    order = np.argsort(-(moment / moment.diagonal().mean()).diagonal(), kind="stable")
    inverse, w, codes = np.linalg.inv(h), row.astype(np.float64).copy(), np.zeros(len(row))
    for j in order:
        codes[j] = np.clip(np.rint(w[j] / scale) + zero, *top)
        w -= (w[j] - (codes[j] - zero) * scale) / inverse[j, j] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # done with: keeps later divisions away from 0 / 0
    return codes


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("length", [1, 7, 24, 40])
def test_codes_are_those_of_the_formula(bits, symmetric, length, monkeypatch):
    monkeypatch.setattr(compensate, "BLOCK", 16)
    weight, moment = torch.randn(4, length), moment_of(length)
    quant = quantize_weight(weight, bits, symmetric=symmetric, rounding="compensated", moment=moment)
    grid = minmax_grid(weight, bits, symmetric)
    top = (grid.lowest, grid.highest)
    for n, row in enumerate(weight.numpy()):
        expected = reference_codes(row, grid.scale[n].item(), grid.zero[n].item(), top, moment.double().numpy())
        assert np.array_equal(quant.codes[n].numpy(), expected), n


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_range_by_error_is_never_worse(shape, bits, symmetric, rounding):
    weight, moment = torch.randn(shape) * torch.rand(shape).pow(3), moment_of(torch.Size(shape[1:]).numel())
    plain = {"symmetric": symmetric}
    if rounding == "nearest":
        widest = error(weight, None, bits, **plain)
        assert (error(weight, None, bits, weight_range="mse", **plain) <= widest * 1.00001).all()
    how = plain | {"rounding": rounding}
    widest = error(weight, moment, bits, **how)
    assert (error(weight, moment, bits, weight_range="output", **how) <= widest * 1.0001 + 1e-12).all()


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.85), (4, 0.96)])
def test_a_range_by_error_helps_long_tails(bits, expected):
    weight = torch.randn(16, 200).pow(3)
    ratio = error(weight, None, bits, weight_range="mse").sum() / error(weight, None, bits).sum()
    assert ratio < expected


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("rank", [None, 9])
def test_compensated_is_better_on_average(bits, symmetric, rank):
    plain, made_up = 0.0, 0.0
    for seed in range(6):
        weight, moment = torch.randn(8, 33), moment_of(33, rank, seed)
        one = error(weight, moment, bits, symmetric=symmetric)
        two = error(weight, moment, bits, symmetric=symmetric, rounding="compensated")
        assert two.sum() < one.sum()
        plain, made_up = plain + one.sum(), made_up + two.sum()
    assert made_up < 0.7 * plain


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_nothing_is_made_up_for_where_inputs_are_independent(bits, symmetric):
    weight = torch.randn(6, 50)
    nearest = quantize_weight(weight, bits, symmetric=symmetric)
    for moment in (torch.diag(torch.rand(50) + 0.1), torch.zeros(50, 50), torch.diag((torch.rand(50) > 0.5).float())):
        quant = quantize_weight(weight, bits, symmetric=symmetric, rounding="compensated", moment=moment)
        assert torch.equal(quant.codes, nearest.codes) and torch.equal(quant.scale, nearest.scale)


@pytest.mark.parametrize("how", [{"weight_range": "mse"}, {"rounding": "compensated"}, {"weight_range": "output"}])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_exact_on_weights_that_can_be_represented(bits, symmetric, how):
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    integers = torch.randint(-top if symmetric else 0, top + 1, (5, 31)).float()
    integers[:, 0], integers[:, 1] = top, -top if symmetric else 0
    weight = (integers - (0 if symmetric else 1)) * 0.125
    quant = quantize_weight(weight, bits, symmetric=symmetric, moment=moment_of(31), **how)
    torch.testing.assert_close(quant.dequantize(), weight, rtol=1e-6, atol=1e-7)


def test_memory_for_many_grids_changes_nothing(monkeypatch):
    weight, moment = torch.randn(6, 40), moment_of(40)
    how: dict[str, Any] = {"weight_range": "output", "rounding": "compensated", "moment": moment}
    one = quantize_weight(weight, 2, **how)
    monkeypatch.setattr(compensate, "ROOM", 1)
    two = quantize_weight(weight, 2, **how)
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale)


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("weight_range", ["minmax", "mse", "output"])
def test_weights_out_of_the_ordinary(weight_range, rounding):
    moment = moment_of(9)
    weight = torch.randn(6, 9)
    weight[0], weight[1], weight[2], weight[3] = 0.0, 0.37, 1e30 * weight[2], 1e-44
    for w in (weight, weight[1:2].half(), weight[4:].bfloat16(), weight.T.contiguous().T):
        quant = quantize_weight(w, 4, weight_range=weight_range, rounding=rounding, moment=moment)
        assert torch.isfinite(quant.dequantize()).all() and torch.isfinite(quant.scale).all()
        assert ((quant.dequantize() - w.float()).abs().amax(1) <= w.float().abs().amax(1) + 1e-30).all()
    assert torch.equal(quantize_weight(weight, 4, rounding=rounding, moment=moment).dequantize()[0], torch.zeros(9))


def test_an_indefinite_moment_is_damped_until_it_is_not():
    moment = moment_of(20, rank=3)
    moment = moment - 0.05 * moment.diagonal().mean() * torch.eye(20)
    assert torch.linalg.eigvalsh(moment).min() < 0
    compensation = Compensation.of(moment)
    assert torch.isfinite(compensation.factor).all() and (compensation.factor.diagonal() > 0).all()
    weight = torch.randn(3, 20)
    assert torch.isfinite(compensated_codes(weight, minmax_grid(weight, 4, False), compensation)).all()


@pytest.mark.parametrize("how", [{"rounding": "compensated"}, {"weight_range": "output"}])
def test_a_moment_that_is_missing_or_of_another_layer(how):
    with pytest.raises(QuantizationError, match="expected a moment"):
        quantize_weight(torch.randn(2, 6), 4, **how)
    with pytest.raises(QuantizationError, match=r"shape \(5, 5\), expected \(6, 6\)"):
        quantize_weight(torch.randn(2, 6), 4, moment=torch.eye(5), **how)


def test_shapes_alone_on_the_meta_device():
    quant = quantize_weight(torch.empty(3, 8, device="meta"), 4, rounding="compensated", moment=torch.eye(8))
    assert quant.codes.shape == (3, 8) and quant.codes.is_meta


def test_moments_that_are_not_finite_are_refused():
    """Without the check damping would be raised forever."""
    moment = torch.eye(8)
    moment[0, 1] = moment[1, 0] = torch.nan
    with pytest.raises(QuantizationError, match="moment has NaN"):
        quantize_weight(torch.randn(4, 8), 4, rounding="compensated", moment=moment)
