"""Synthetic error functions of schedules, by place of the level: what searches are judged on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ErrorOf = Callable[[np.ndarray], np.ndarray]
"""[n, steps] levels to [n] errors."""
COSTS = {"16": 1.0, "W8A8": 0.5, "W4A8": 0.25, "W3A8": 0.19, "W2A8": 0.13}


def singles(seed: int, steps: int, levels: int) -> np.ndarray:
    """[steps, levels] errors of single steps: growing with the level, uneven over the steps, 0 at level 0."""
    random = np.random.default_rng(seed)
    profile = np.exp(random.normal(0, 1.2, steps) + random.normal(0, 0.4) * np.arange(steps))
    errors = np.zeros((steps, levels))
    for level in range(1, levels):
        own = profile * np.exp(random.normal(0, 0.5, steps)) * 4.0**level * 1e-4
        errors[:, level] = 1.2 * errors[:, level - 1] + own
    return errors


def taken(errors: np.ndarray, choices: np.ndarray) -> np.ndarray:
    return errors[np.arange(errors.shape[0]), choices]


def additive(seed: int, steps: int, levels: int) -> ErrorOf:
    errors = singles(seed, steps, levels)
    return lambda choices: taken(errors, choices).sum(-1)


def correlated(seed: int, steps: int, levels: int, size: int = 400) -> ErrorOf:
    """Power of a sum of error vectors with a common part: measured over added up is some 1.2 to 1.4 at 8 steps."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(steps, levels, size))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    common = random.normal(size=size)
    common /= np.linalg.norm(common)
    share = random.uniform(0.25, 0.4)
    mixed = np.sqrt(1 - share**2) * vectors + share * common
    mixed *= np.sqrt(singles(seed, steps, levels))[..., None]
    products = np.einsum("tkd,uld->tkul", mixed, mixed)

    def error(choices: np.ndarray) -> np.ndarray:
        pairs = ((t, u) for t in range(steps) for u in range(steps))
        return sum((products[t, choices[:, t], u, choices[:, u]] for t, u in pairs), np.zeros(len(choices)))

    return error


def saturating(seed: int, steps: int, levels: int) -> ErrorOf:
    """What 1 - SSIM does: large errors are squeezed together below 1."""
    power = correlated(seed, steps, levels)
    worst = power(np.full((1, steps), levels - 1))[0]
    return lambda choices: 1 - np.exp(-2 * power(choices) / worst)


def interacting(seed: int, steps: int, levels: int) -> ErrorOf:
    """Pairs of steps make each other worse, by amounts that depend on the steps and their levels."""
    errors, random = singles(seed, steps, levels), np.random.default_rng(seed + 1)
    pairs = np.triu(random.uniform(0, 0.25, (steps, steps)), 1)
    roots = np.sqrt(errors) * random.uniform(0.5, 1.5, errors.shape)

    def error(choices: np.ndarray) -> np.ndarray:
        x = taken(roots, choices)
        return taken(errors, choices).sum(-1) + np.einsum("nt,tu,nu->n", x, pairs, x)

    return error


FAMILIES = {"additive": additive, "correlated": correlated, "saturating": saturating, "interacting": interacting}
