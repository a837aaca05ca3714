"""Estimates drawn together: nearer to the truth than means are, and harmless where layers have nothing in common."""

from __future__ import annotations

import numpy as np
import pytest

from mixdq_ao.search.probe_shrink import FARTHEST, shrunk
from mixdq_ao.search.probe_stats import rank_correlation

LAYERS, COLUMNS, SAMPLES = 300, 5, 4


def made(own: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(true powers, |dY|^2, means of SAMPLES squares, their number). ``own``: spread of a column's own log gain beside
    its layer's, whose is 1."""
    rng = np.random.default_rng(seed)
    change = np.exp(rng.normal(0, 3, (LAYERS, 1)) - 2.5 * np.arange(COLUMNS))
    gain = np.exp(rng.normal(0, 1, (LAYERS, 1)) + own * rng.normal(0, 1, (LAYERS, COLUMNS)))
    true = change * gain
    seen = true * rng.chisquare(SAMPLES, true.shape) / SAMPLES
    return true, change, seen, np.full(true.shape, float(SAMPLES))


def miss(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.square(np.log(found / true)).mean())


@pytest.mark.parametrize("own, most", [(0.0, 0.35), (0.3, 0.55), (3.0, 1.02)])
def test_nearer_to_the_truth(own, most):
    """A layer's widths tell of each other where they have much in common; where they have nothing, little changes."""
    true, change, seen, count = made(own)
    found, deviation = shrunk(seen, change, count)
    assert miss(found, true) < most * miss(seen, true)
    for column in range(COLUMNS):
        pair = [rank_correlation(x[:, column], true[:, column]) for x in (found, seen)]
        assert pair[0] > pair[1] - 1e-3
    z = np.log(found / true) / deviation
    assert 0.6 < z.std() < 1.4, "deviations are of the right size"
    assert abs(np.log(found.sum(0) / true.sum(0))).max() < 0.5


def test_a_layer_unlike_all_others_keeps_its_answer():
    true, change, seen, count = made(0.1)
    seen[7, 2] = 1e4 * true[7, 2]
    found = shrunk(seen, change, count)[0]
    deviations = np.log(seen[7, 2] / found[7, 2]) / np.sqrt(0.6449)  # trigamma(2)
    assert deviations == pytest.approx(FARTHEST, abs=1e-3)


def test_what_cannot_be_drawn_stays():
    true, change, seen, count = made(0.1)
    few, deviations = shrunk(seen[:19], change[:19], count[:19])
    assert np.array_equal(few, seen[:19]) and np.isnan(deviations).all()
    seen[3, 1], seen[4, 0], change[5, 2] = 0.0, np.inf, 0.0
    found, deviations = shrunk(seen, change, count)
    rows = [3, 4, 5]
    assert np.array_equal(found[rows], seen[rows]) and np.isnan(deviations[rows]).all()
    assert np.isfinite(np.delete(found, rows, 0)).all() and not np.isnan(np.delete(deviations, rows, 0)).any()


def test_more_squares_are_believed_more():
    true, change, seen, count = made(0.3)
    many, _ = shrunk(seen, change, 1e6 * count)
    assert np.allclose(many, seen, rtol=1e-3)
