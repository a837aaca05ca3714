"""Whether errors add up: 1 where they do, less and above 1 where they do not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from mixdq_ao import ScheduleError, search_schedule
from mixdq_ao.temporal.additivity import check_additivity
from mixdq_ao.temporal.collect import results_of
from mixdq_ao.temporal.results import ScheduleResults

from .errors import COSTS, FAMILIES

LEVELS = dict(list(COSTS.items())[:4])


def error_of(family: str):
    of, names = FAMILIES[family](1, 8, 4), list(LEVELS)
    return lambda s: float(of(np.array([[names.index(n) for n in s]]))[0])


def test_errors_that_add_up_are_predicted_exactly():
    result = check_additivity(error_of("additive"), steps=8, levels=LEVELS)
    assert result.r_squared == pytest.approx(1) and result.ratio == pytest.approx(1)
    assert len(result.schedules) == len(set(result.schedules)) == 40
    assert {n: len(v) for n, v in result.singles.items()} == {"W8A8": 8, "W4A8": 8, "W3A8": 8}


def test_errors_that_correlate_exceed_their_sum():
    result = check_additivity(error_of("correlated"), steps=8, levels=LEVELS)
    assert 1.1 < result.ratio < 1.6 and 0.9 < result.r_squared < 1


def test_a_base_error_is_counted_once():
    plain, shifted = (
        error_of("additive"),
        check_additivity(lambda s: 0.5 + error_of("additive")(s), steps=8, levels=LEVELS),
    )
    for schedule, predicted in zip(shifted.schedules, shifted.predicted, strict=True):
        assert predicted == pytest.approx(0.5 + plain(schedule))


def test_measurements_are_shared_with_the_search(tmp_path):
    settings = {"steps": 8, "levels": LEVELS, "store": tmp_path / "s"}
    search_schedule(error_of("additive"), max_cost=0.4, **settings)
    calls = []

    def counted(schedule):
        calls.append(schedule)
        return error_of("additive")(schedule)

    check_additivity(counted, **settings)
    assert len(calls) < 8 * 3 + 1 + 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"schedules": 2}, "schedules is 2"), ({"steps": 2, "schedules": 40}, "2 steps of 4 levels have fewer")],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ScheduleError, match=words):
        check_additivity(error_of("additive"), **{"steps": 8, "levels": LEVELS, **arguments})


@pytest.mark.parametrize("worst", [0.3, 0.1 + 0.2])
def test_errors_that_are_all_equal_have_no_correlation_and_are_kept(tmp_path, worst):
    """One error however many steps are cheap; rounding of the sums is no spread."""
    levels = {"a": 1.0, "b": 0.7, "c": 0.6, "d": 0.5}

    def error(schedule):
        return 0.1 + 0.1 * sum(n != "a" for n in schedule) if schedule.count("a") else worst

    result = check_additivity(error, steps=2, levels=levels, schedules=5)
    assert math.isnan(result.r_squared) and result.ratio == pytest.approx(1)
    results_of([], levels, "m", added=result).save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["additivity"]["m"]["r_squared"] is None
    loaded = ScheduleResults.load(tmp_path / "r.json").additivity["m"]
    assert math.isnan(loaded.r_squared) and replace(loaded, r_squared=0.0) == replace(result, r_squared=0.0)


def test_errors_without_a_logarithm_are_refused():
    with pytest.raises(ScheduleError, match="not positive"):
        check_additivity(lambda s: 0.0, steps=8, levels=LEVELS)
