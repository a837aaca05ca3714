"""The search: within its limit, as good as exhaustive search, never worse than a person, resumable."""

from __future__ import annotations

import itertools
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixdq_ao import Schedule, ScheduleError, SensitivityError, TemporalPlan, search_schedule
from mixdq_ao.temporal.baselines import exhaustive, greedy, hand_set
from mixdq_ao.temporal.collect import results_of
from mixdq_ao.temporal.correlation import ErrorModel
from mixdq_ao.temporal.forms import first_n, hand_names, last_n, spread
from mixdq_ao.temporal.goal import Goal
from mixdq_ao.temporal.results import ScheduleResults
from mixdq_ao.temporal.schedule import evaluation_limit

from .errors import COSTS, FAMILIES, singles

ROOT = Path(__file__).resolve().parents[2]


def names(count: int) -> dict[str, float]:
    return dict(itertools.islice(COSTS.items(), count))


class Measure:
    """An error function that counts, and can stop a search in the middle."""

    def __init__(self, family: str, seed: int, steps: int, levels: int, stop: int | None = None) -> None:
        self.of, self.names, self.stop = FAMILIES[family](seed, steps, levels), list(names(levels)), stop
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, schedule: tuple[str, ...]) -> float:
        if self.stop is not None and len(self.calls) >= self.stop:
            raise KeyboardInterrupt
        self.calls.append(schedule)
        return float(self.of(np.array([[self.names.index(n) for n in schedule]]))[0])


def optimum(of, steps: int, levels: int, *, max_cost: float | None = None, max_error: float | None = None) -> float:
    """Error (or cost) of the best of all schedules."""
    choices = np.array(list(itertools.product(range(levels), repeat=steps)))
    cost, error = np.array(list(COSTS.values()))[choices].mean(1), of(choices)
    if max_cost is not None:
        return error[cost <= max_cost * (1 + 1e-9)].min()
    return cost[error <= max_error * (1 + 1e-9)].min()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("steps", "levels"), [(8, 3), (6, 4), (5, 5), (1, 2), (2, 3)])
def test_reaches_the_optimum_within_the_limit(family, steps, levels):
    for seed in range(3):
        measure = Measure(family, seed, steps, levels)
        cheapest = list(COSTS.values())[levels - 1]
        max_cost = float(np.random.default_rng(seed).uniform(cheapest + 0.03, 0.75))
        found = search_schedule(measure, steps=steps, levels=names(levels), max_cost=max_cost)
        assert found.cost <= max_cost * (1 + 1e-9)
        assert found.evaluations == len(measure.calls) == len(set(measure.calls)) <= evaluation_limit(steps, levels)
        assert found.error == found.history[found.levels] == measure(found.levels)
        assert optimum(measure.of, steps, levels, max_cost=max_cost) >= 0.95 * found.error


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cheapest_within_an_error(family):
    for seed in range(3):
        measure = Measure(family, seed, 6, 4)
        max_error = 0.1 * measure(("W3A8",) * 6)
        found = search_schedule(measure, steps=6, levels=names(4), max_error=max_error)
        assert found.error <= max_error * (1 + 1e-9)
        assert found.evaluations <= evaluation_limit(6, 4)
        assert optimum(measure.of, 6, 4, max_error=max_error) >= 0.95 * found.cost


@pytest.mark.parametrize("family", FAMILIES)
def test_no_schedule_set_by_hand_is_better(family):
    measure = Measure(family, 5, 20, 5)
    found = search_schedule(measure, steps=20, levels=COSTS, max_cost=0.3)
    by_hand = hand_set(measure, steps=20, levels=COSTS, max_cost=0.3)
    assert {name.split()[0] for name in by_hand} == {"uniform", "first", "last", "spread"}
    assert all(s.cost <= 0.3 * (1 + 1e-9) for s in by_hand.values())
    assert found.error <= min(s.error for s in by_hand.values())
    assert found.evaluations <= evaluation_limit(20, 5)


def test_intervals_without_error_are_not_split():
    """Only the last two of 32 steps matter: bisection walks down to them and leaves the rest alone."""
    hot = np.zeros(32)
    hot[-2:] = 1.0, 3.0
    found = search_schedule(
        lambda s: float(sum(h for h, name in zip(hot, s, strict=True) if name == "b")) + 1e-9,
        steps=32,
        levels={"a": 1.0, "b": 0.5},
        max_cost=0.55,
    )
    assert found.levels[-2:] == ("a", "a")
    assert found.evaluations <= 2 + 2 * 5 + 16 + 2 + 3  # whole runs, halves, patience, schedules set by hand


def test_a_stopped_search_continues_and_finds_the_same(tmp_path):
    whole = Measure("correlated", 1, 6, 4)
    expected = search_schedule(whole, steps=6, levels=names(4), max_cost=0.4)
    settings = {"steps": 6, "levels": names(4), "max_cost": 0.4, "store": tmp_path / "s", "subject": "m"}
    done = 0
    for stop in (5, 20):
        measure = Measure("correlated", 1, 6, 4, stop)
        with pytest.raises(KeyboardInterrupt):
            search_schedule(measure, **settings)
        done += len(measure.calls)
    last = Measure("correlated", 1, 6, 4)
    assert search_schedule(last, **settings) == expected
    assert done + len(last.calls) == expected.evaluations
    again = Measure("correlated", 1, 6, 4)
    assert search_schedule(again, **settings) == expected and not again.calls
    with pytest.raises(SensitivityError, match="other settings"):
        search_schedule(again, **{**settings, "subject": "another model"})


KILLED = """
import os, signal, sys
import numpy as np
from mixdq_ao import search_schedule
from tests.temporal.test_schedule import Measure, names

measure, count = Measure("correlated", 1, 6, 4), 0

def error(schedule):
    global count
    count += 1
    if count > 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(schedule)

search_schedule(error, steps=6, levels=names(4), max_cost=0.4, store=sys.argv[1], subject="m")
"""


def test_a_search_that_was_killed_continues(tmp_path):
    """kill -9 in the middle of an evaluation, and a line that was only half written."""
    settings = {"steps": 6, "levels": names(4), "max_cost": 0.4}
    expected = search_schedule(Measure("correlated", 1, 6, 4), **settings)
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s")], cwd=ROOT, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with open(tmp_path / "s", "ab") as file:
        file.write(b'{"key": "torn')
    last = Measure("correlated", 1, 6, 4)
    assert search_schedule(last, **settings, store=tmp_path / "s", subject="m") == expected
    assert len(last.calls) == expected.evaluations - 7


@pytest.mark.parametrize(("value", "words"), [(math.nan, "is nan"), (math.inf, "is inf"), ("much", "is 'much'")])
def test_an_error_that_is_no_number_names_the_schedule(tmp_path, value, words):
    def error(schedule):
        return value if "b" in schedule[:1] else 0.5

    settings = {"steps": 2, "levels": {"a": 1.0, "b": 0.5}, "max_cost": 0.8, "store": tmp_path / "s"}
    with pytest.raises(ScheduleError, match=f"error of b b {words}"):
        search_schedule(error, **settings)
    found = search_schedule(lambda s: float(s.count("b")), **settings)  # what was measured before is kept
    assert found.history["a", "a"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"levels": {"a": 1.0}}, "expected at least two"),
        ({"levels": {"a": 0.5, "b": 0.5}}, "level 'b': cost is 0.5, expected less than the 0.5"),
        ({"levels": {"a": 1.0, "b": 0.0}}, "level 'b': cost is 0.0"),
        ({"levels": {"a": math.nan, "b": 0.5}}, "level 'a': cost is nan"),
        ({"max_cost": None}, "exactly one of max_cost"),
        ({"max_error": 0.1}, "exactly one of max_cost"),
        ({"max_cost": 0.4}, "even the cheapest level everywhere costs 0.5"),
        ({"levels": {"a": np.float64(1.0), "b": True}}, "level 'b': cost is True"),
        ({"max_cost": math.nan}, "max_cost is nan"),
        ({"max_cost": 10**400}, "max_cost is 1000"),
        ({"max_cost": None, "max_error": -1.0}, "max_error is -1.0"),
        ({"max_cost": None, "max_error": 0.5}, "'a' at every step already has an error of 1.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    settings = {"steps": 3, "levels": {"a": 1.0, "b": 0.5}, "max_cost": 0.8}
    with pytest.raises(ScheduleError, match=words):
        search_schedule(lambda s: 1.0, **{**settings, **arguments})


@pytest.mark.parametrize("number", [np.float64, np.float32])
def test_costs_may_be_numpys(tmp_path, number):
    levels = {"a": number(1), "b": number(0.5)}
    found = search_schedule(lambda s: float(s.count("b")), steps=4, levels=levels, max_cost=number(0.75))
    assert found.levels.count("b") == 2 and found.cost == 0.75
    plan = TemporalPlan(dict.fromkeys(levels), found.levels, levels)
    plan.save(tmp_path / "plan.json")
    assert TemporalPlan.load(tmp_path / "plan.json") == plan
    results = results_of([found], levels, "m")
    results.save(tmp_path / "results.json")
    assert ScheduleResults.load(tmp_path / "results.json") == results


def test_a_cost_that_allows_every_step_precise_needs_no_search():
    found = search_schedule(lambda s: float(s.count("b")), steps=9, levels={"a": 1.0, "b": 0.5}, max_cost=1.0)
    assert found.levels == ("a",) * 9 and found.evaluations == 2


def test_exhaustive_and_greedy_find_optima_of_additive_errors():
    measure = Measure("additive", 2, 5, 3)
    best = optimum(measure.of, 5, 3, max_cost=0.5)
    assert exhaustive(measure, steps=5, levels=names(3), max_cost=0.5).error == pytest.approx(best)
    walked = greedy(measure, steps=5, levels=names(3), max_cost=0.5)
    assert walked.cost <= 0.5 and best <= walked.error <= 2 * best
    within = greedy(measure, steps=5, levels=names(3), max_error=best)
    assert within.error <= best
    with pytest.raises(ScheduleError, match="are 1152921504606846976 schedules"):
        exhaustive(measure, steps=30, levels=dict(zip("abcd", (4.0, 3.0, 2.0, 1.0), strict=True)), max_cost=3.0)


def test_forms():
    assert first_n(5, 2, 0, 1) == (0, 0, 1, 1, 1) and last_n(5, 2, 0, 1) == (1, 1, 1, 0, 0)
    assert spread(8, 2, 0, 1) == (1, 1, 1, 0, 1, 1, 1, 0) and spread(5, 4, 0, 1).count(0) == 4
    named = hand_names(4, ["a", "b", "c"])
    assert named["b", "b", "b", "b"] == "uniform b" and named["a", "c", "c", "c"] == "first 1 a/c"
    assert named["c", "b", "c", "b"] == "spread 2 b/c" and ("a", "b", "c", "c") not in named


def test_the_error_model_recovers_correlations_and_prices_every_change():
    """Vectors with known correlations: after enough measurements the model predicts what it was not told, and its
    table of changes agrees with predicting each changed choice."""
    random, measure = np.random.default_rng(3), FAMILIES["correlated"](3, 5, 3)
    model = ErrorModel(singles(3, 5, 3), 0.0)
    for choice in random.integers(0, 3, (60, 5)):
        model.learn(tuple(choice.tolist()), float(measure(choice[None])[0]))
    model.fit(1e-3)
    fresh = random.integers(0, 3, (40, 5))
    fresh = fresh[fresh.sum(1) > 0]
    predicted = np.array([model.predict(tuple(c.tolist())) for c in fresh])
    added = np.array([ErrorModel(singles(3, 5, 3), 0.0).predict(tuple(c.tolist())) for c in fresh])
    true = measure(fresh)
    assert 1.05 < np.median(true / added) < 1.5
    assert np.abs(predicted / true - 1).mean() < 0.25 * np.abs(added / true - 1).mean()
    choice = (2, 0, 1, 1, 2)
    one, two = model.neighbours(choice)
    for t, k in itertools.product(range(5), range(3)):
        changed = (*choice[:t], k, *choice[t + 1 :])
        assert one[t, k] == pytest.approx(model.predict(changed))
    for pair, (t, u) in enumerate(zip(*np.triu_indices(5, 1), strict=True)):
        for k, level in itertools.product(range(3), range(3)):
            changed = list(choice)
            changed[t], changed[u] = k, level
            assert two[pair, k, level] == pytest.approx(model.predict(tuple(changed)))


def test_the_additive_program_is_exact():
    shares = singles(4, 6, 4)
    goal = Goal(np.array(list(COSTS.values()))[:4], max_cost=0.45)
    choices = np.array(list(itertools.product(range(4), repeat=6)))
    fits = goal.costs[choices].mean(1) <= 0.45 * (1 + 1e-9)
    best = shares[np.arange(6), choices[fits]].sum(1).min()
    found = goal.additive(shares, 0.0)
    assert found is not None and shares[np.arange(6), list(found)].sum() == pytest.approx(best)
    within = Goal(goal.costs, max_error=best + 1.0).additive(shares, 1.0)
    assert within is not None and shares[np.arange(6), list(within)].sum() <= best * (1 + 1e-6)


@pytest.mark.parametrize("unit", [1.0, 1e-8, 1e-14, 1e8])
def test_the_additive_program_is_exact_in_any_unit_of_the_error(unit):
    costs = np.array(list(COSTS.values()))[:4]
    choices = np.array(list(itertools.product(range(4), repeat=6)))
    for seed in range(5):
        shares = unit * singles(seed, 6, 4)
        errors, means = shares[np.arange(6), choices].sum(1), costs[choices].mean(1)
        found = Goal(costs, max_cost=0.45).additive(shares, 0.0)
        assert found is not None and shares[np.arange(6), list(found)].sum() == pytest.approx(
            errors[means <= 0.45 * (1 + 1e-9)].min(), rel=1e-9, abs=0
        )
        limit = float(np.median(errors))
        within = Goal(costs, max_error=limit).additive(shares, 0.0)
        assert within is not None and costs[list(within)].mean() == pytest.approx(means[errors <= limit].min())
        assert shares[np.arange(6), list(within)].sum() <= limit * (1 + 1e-8)


def test_a_schedule_prints_without_its_history():
    assert "history" not in repr(Schedule(("a",), 0.1, 1.0, 2, {("a",): 0.1}))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"error": lambda s: -0.5}, "is -0.5, expected a number from 0 up; .* as 1 - SSIM"),
        ({"patience": 0}, "patience is 0, expected a whole number"),
        ({"patience": "x"}, "patience is 'x'"),
        ({"resolution": float("nan")}, "resolution is nan, expected a number from 0"),
        ({"resolution": -1}, "resolution is -1"),
        ({"levels": ["a", "b"]}, r"levels is \['a', 'b'\], expected at least two, {name: relative cost}"),
    ],
)
def test_arguments_that_are_none_are_named(given, says):
    """A score that is better when higher used to search for ever."""
    arguments = {"error": lambda s: 1.0 + s.count("b"), "levels": {"a": 1.0, "b": 0.25}} | given
    with pytest.raises(ScheduleError, match=says):
        search_schedule(arguments.pop("error"), steps=4, max_cost=0.7, **arguments)
