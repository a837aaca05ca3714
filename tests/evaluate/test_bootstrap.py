"""Intervals: what they are, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixdq_ao.evaluate.bootstrap import interval
from mixdq_ao.evaluate.frechet import Gaussian, distance, influence


def test_the_interval_of_a_mean_is_the_percentile_bootstrap():
    scores = np.random.default_rng(0).gamma(2, size=300)
    low, high = interval(scores.mean(), scores - scores.mean(), resamples=4000)
    rng = np.random.default_rng(1)
    direct = np.quantile([rng.choice(scores, 300).mean() for _ in range(4000)], (0.025, 0.975))
    assert (low, high) == pytest.approx(direct, abs=0.012)  # both are estimates; the width is .33
    assert interval(1.0, scores - scores.mean()) == interval(1.0, scores - scores.mean())


def test_large_sets_are_resampled_in_pieces_as_one(monkeypatch):
    linear = np.random.default_rng(0).normal(size=50)
    whole = interval(0.0, linear, resamples=300)
    monkeypatch.setattr("mixdq_ao.evaluate.bootstrap.CHUNK", 120)
    assert interval(0.0, linear, resamples=300) == pytest.approx(whole, abs=1e-12)


def test_the_interval_of_a_mean_holds_the_truth_in_95_of_100():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        scores = rng.normal(3.0, 2.0, size=60)
        low, high = interval(scores.mean(), scores - scores.mean(), resamples=500)
        held += low <= 3.0 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_the_interval_of_a_distance_holds_that_of_as_many_other_pictures():
    """The truth is known: the mean distance of sets of this size, from sets that take no part in the intervals."""
    rng = np.random.default_rng(0)
    count, d = 300, 4
    real = Gaussian(torch.zeros(d).double(), torch.eye(d).double())
    scale = np.diag([1.0, 1.3, 0.6, 1.0])

    def draw():
        return rng.normal(size=(count, d)) @ scale + 0.3

    truth = np.mean([distance(Gaussian.of(draw()), real) for _ in range(200)])
    held, widths = 0, []
    for _ in range(120):
        a = draw()
        low, high = interval(distance(Gaussian.of(a), real), influence(a, real), resamples=500)
        held += low <= truth <= high
        widths.append(high - low)
    assert 0.88 <= held / 120 <= 0.99
    resampled = [distance(Gaussian.of(a[rng.integers(0, count, count)]), real) for _ in range(300)]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(resampled), rel=0.2)
