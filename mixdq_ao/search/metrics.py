"""Picture and signal metrics in float64, none of which uses a neural network."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import MixDQError

WINDOW, SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
MAX_PSNR = 100.0
"""dB of equal images."""
OVERFLOW = 1e6
"""Relative error power recorded for outputs that overflow."""


def error_power(reference: Tensor, other: Tensor) -> float:
    """Relative error power ``sum (y - yq)^2 / sum y^2`` over all elements; 0 for equal tensors, inf where only
    the reference is zero."""
    _same_shape(reference, other)
    reference = reference.double()
    noise = (reference - other.double()).square().sum().item()
    signal = reference.square().sum().item()
    return 0.0 if noise == 0 else noise / signal if signal > 0 else math.inf


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise ratio ``10 log10(sum y^2 / sum (y - yq)^2)`` in dB; inf for equal tensors."""
    error = error_power(reference, other)
    return math.inf if error == 0 else -math.inf if math.isinf(error) else -10.0 * math.log10(error)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal to noise ratio of each image in dB, for values in [0, 1]; at most 100.

    Args: two tensors [B, C, H, W]. Returns float64 [B].
    """
    _images(images, reference)
    mse = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return -10.0 * mse.clamp_min(10.0 ** (-MAX_PSNR / 10.0)).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, for values in [0, 1].

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), equation 13:
    ``(2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2))`` with C1 = 0.01^2, C2 = 0.03^2 and local
    moments under an 11 x 11 Gaussian window of sigma 1.5; the mean over channels and over the positions where the
    whole window fits.

    Args: two tensors [B, C, H, W], H and W at least 11. Returns float64 [B].
    """
    _images(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        raise MixDQError(
            f"images are {tuple(images.shape[-2:])}, expected at least {WINDOW} x {WINDOW} pixels for SSIM"
        )
    x, y = images.double(), reference.double()
    mx, my, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    luminance = (2 * mx * my + SSIM_C1) / (mx * mx + my * my + SSIM_C1)
    structure = (2 * cov + SSIM_C2) / (vx + vy + SSIM_C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of two sets of features [n, d], each taken as a Gaussian (Heusel et al. 2017, equation 6):
    ``|ma - mb|^2 + tr(Ca + Cb - 2 (Ca^(1/2) Cb Ca^(1/2))^(1/2))``.

    A covariance from n <= d samples is singular; it is then shrunk towards its own mean variance,
    ``(1 - a) C + a tr(C) / d I`` with a = d / (n + d), so that distances at small n are comparable with each other (not
    with those at large n).
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or features.shape[0] < 2 or not torch.isfinite(features).all():
            raise MixDQError(f"{name} is {tuple(features.shape)}, expected finite [n, d] with n >= 2")
    if features_a.shape[1] != features_b.shape[1]:
        raise MixDQError(f"features have {features_a.shape[1]} and {features_b.shape[1]} dimensions, expected the same")
    return gaussian_distance(*_gaussian(features_a.double()), *_gaussian(features_b.double()))


def gaussian_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """The Frechet distance of two Gaussians: means [d], covariances [d, d], float64. Both square roots come from
    symmetric eigen-decompositions, which need no complex numbers."""
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    n, d = features.shape
    covariance = torch.atleast_2d(torch.cov(features.T))
    if n <= d:
        shrink = d / (n + d)
        identity = torch.eye(d, dtype=features.dtype, device=features.device)
        covariance = (1 - shrink) * covariance + shrink * covariance.trace() / d * identity
    return features.mean(dim=0), covariance


def _blur(x: Tensor) -> Tensor:
    """The Gaussian window over the last two axes, valid positions only; separable, so two passes."""
    position = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-(position**2) / (2 * SIGMA**2))
    window = window / window.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    flat = functional.conv2d(functional.conv2d(flat, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.numel() == 0:
        raise MixDQError(f"shapes are {tuple(a.shape)} and {tuple(b.shape)}, expected two equal, non-empty ones")


def _images(a: Tensor, b: Tensor) -> None:
    _same_shape(a, b)
    if a.ndim != 4:
        raise MixDQError(f"images are {tuple(a.shape)}, expected [B, C, H, W]")
