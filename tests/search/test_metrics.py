"""Metrics against direct formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from mixdq_ao.errors import MixDQError
from mixdq_ao.search.metrics import error_power, frechet_distance, psnr, sqnr, ssim


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def direct_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One channel, every window by hand."""
    position = np.arange(11) - 5
    window = np.exp(-(position[:, None] ** 2 + position[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            top = (2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2)
            values.append(top / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2)))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(2, 3, 16, 19), (1, 1, 11, 11), (3, 4, 13, 12)])
def test_ssim_against_loops(shape: tuple[int, ...]) -> None:
    x, y = images(*shape), (images(*shape) + 0.2 * images(*shape, seed=1)).clamp(0, 1)
    expected = [
        np.mean([direct_ssim(a, b) for a, b in zip(p, q, strict=True)])
        for p, q in zip(x.double().numpy(), y.double().numpy(), strict=True)
    ]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim(y, x).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_of_equal_and_of_channels_last_images() -> None:
    x = images(2, 3, 20, 20)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    y = x.flip(0)
    assert torch.equal(ssim(x, y), ssim(x.contiguous(memory_format=torch.channels_last), y))


def test_psnr_per_image() -> None:
    x = images(3, 3, 8, 8).double() * 0.5
    y = x.clone()
    y[1] += 0.1
    y[2] += 0.01
    assert psnr(y, x).tolist() == pytest.approx([100.0, 20.0, 40.0])


def test_sqnr_and_error_power() -> None:
    y = images(4, 5).half()
    noise = torch.full_like(y, 0.25)
    power = (noise.double() ** 2).sum() / (y.double() ** 2).sum()
    other = (y.double() + noise.double()).float()
    assert error_power(y, other) == pytest.approx(power.item(), rel=1e-6)
    assert sqnr(y, other) == pytest.approx(-10 * math.log10(power.item()), rel=1e-6)
    assert sqnr(y, y) == math.inf and error_power(y, y) == 0
    assert sqnr(torch.zeros(3), torch.ones(3)) == -math.inf


def test_frechet_of_diagonal_covariances() -> None:
    """Columns of +-s_i in an orthogonal design have exactly uncorrelated samples."""
    design = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    a = design * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 1.0, 2.0])
    b = design * torch.tensor([2.0, 2.5, 0.5])
    variance = 4 / 3
    expected = 0 + 1 + 4 + variance * ((1 - 2.0) ** 2 + (2 - 2.5) ** 2 + (3 - 0.5) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(200, 8), (50, 20), (30, 1)])
def test_frechet_against_sqrtm(n: int, d: int) -> None:
    mix = images(d, d, seed=5).double()
    a, b = images(n, d, seed=2).double() @ mix, images(n + 7, d, seed=3).double() + 0.1
    ca, cb = np.atleast_2d(np.cov(a.numpy().T)), np.atleast_2d(np.cov(b.numpy().T))
    cross = np.trace(np.real(sqrtm(ca @ cb)))
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca) + np.trace(cb) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_with_few_samples_is_shrunk() -> None:
    a, b = images(10, 40, seed=1), images(10, 40, seed=2)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert 0 < frechet_distance(a, b) < frechet_distance(a, b + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ssim(images(1, 3, 10, 20), images(1, 3, 10, 20)), "at least 11 x 11"),
        (lambda: ssim(images(3, 20, 20), images(3, 20, 20)), r"expected \[B, C, H, W\]"),
        (lambda: psnr(images(1, 3, 8, 8), images(1, 3, 8, 9)), "two equal"),
        (lambda: sqnr(torch.ones(0), torch.ones(0)), "non-empty"),
        (lambda: frechet_distance(images(1, 4), images(5, 4)), "n >= 2"),
        (lambda: frechet_distance(images(5, 4), images(5, 3)), "expected the same"),
        (lambda: frechet_distance(images(5, 4) / 0, images(5, 4)), "finite"),
    ],
)
def test_wrong_input(call, message: str) -> None:
    with pytest.raises(MixDQError, match=message):
        call()
