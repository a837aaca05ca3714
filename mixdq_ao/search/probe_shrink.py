"""Shrinks the noisy estimates of few probes towards the trend over layers and bit widths (empirical Bayes).

The p^2 of probes scatter about the power of J dY like a chi-square: with few of them the standard error of the
logarithm of their mean is sqrt(2 / number). But the powers at several bit widths of one layer, each divided by |dY|^2
(which is known exactly), are nearly equal: they are the gain by which the model amplifies changes of that layer. So one
width informs about the others, and all layers about how much widths differ. Log gains are modelled as normal over
layers, with a mean for each bit width and a covariance between widths estimated from all layers; each layer gets its
posterior mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .arrays import Array

FEWEST = 4
"""Least number of layers per column to estimate a covariance from; with fewer, estimates are not shrunk."""
FARTHEST = 2.0
"""Most standard errors that an estimate is moved by, so that an outlying layer keeps its own estimate (limited
translation: Efron and Morris 1972, "Limiting the risk of Bayes and empirical Bayes estimators, part II")."""


def shrunk(power: Array, change: Array, count: Array) -> tuple[Array, Array]:
    """Posterior of the powers [layers, columns], columns being bit widths of weights and activations.

    Args:
        power: means of p^2 over samples and probes, in any unit.
        change: |dY|^2 of the layers' own outputs, in any unit.
        count: number of p^2 in each mean.

    Returns:
        Posterior means, and posterior standard deviations relative to them. Rows with a zero or a value that is not
        finite, and all rows where layers are too few, are returned unchanged with deviations of NaN.
    """
    means, deviations = power.copy(), np.full_like(power, np.nan)
    usable = np.isfinite(power) & np.isfinite(change) & (power > 0) & (change > 0) & (count > 0)
    rows = np.flatnonzero(usable.all(1))
    if len(rows) < FEWEST * power.shape[1]:
        return means, deviations
    # log of a mean of n squares of normals: mean digamma(n/2) - log(n/2), variance trigamma(n/2) (Bartlett and Kendall
    # 1946, "The statistical analysis of variance-heterogeneity and the logarithmic transformation")
    half = torch.from_numpy(count[rows] / 2)
    noise: Any = torch.polygamma(1, half).numpy()
    gain = np.log(power[rows] / change[rows]) - (torch.digamma(half) - half.log()).numpy()
    typical = gain.mean(0)
    posterior, variance = _posterior(gain - typical, noise)
    logs = np.log(change[rows]) + typical + posterior + variance / 2
    own, reach = np.log(power[rows]), FARTHEST * np.sqrt(noise)
    means[rows] = np.exp(np.clip(logs, own - reach, own + reach))
    deviations[rows] = np.sqrt(np.expm1(variance))
    return means, deviations


def _posterior(deviation: Array, noise: Array) -> tuple[Array, Array]:
    """Mean and variance [layers, columns] of normal signals seen with independent ``noise`` (variances)."""
    covariance = deviation.T @ deviation / len(deviation) - np.diag(noise.mean(0))
    values, vectors = np.linalg.eigh(covariance)
    covariance = (vectors * values.clip(min=0)) @ vectors.T
    means, variances = np.empty_like(deviation), np.empty_like(deviation)
    for i, (seen, variance) in enumerate(zip(deviation, noise, strict=True)):
        weights = np.linalg.solve(covariance + np.diag(variance), covariance).T
        means[i] = weights @ seen
        variances[i] = np.diag(covariance - weights @ covariance).clip(min=0)
    return means, variances
