"""Files of measured schedules: the same after reading, named, every broken one refused by name."""

from __future__ import annotations

import json
import math

import pytest

from mixdq_ao import ScheduleError, search_schedule
from mixdq_ao.temporal.additivity import check_additivity
from mixdq_ao.temporal.baselines import hand_set
from mixdq_ao.temporal.collect import results_of
from mixdq_ao.temporal.results import ScheduleResults

LEVELS = {"16": 1.0, "W8": 0.5, "W4": 0.25}
STEP = {"16": 0.0, "W8": 1.0, "W4": 10.0}


def error(schedule: tuple[str, ...]) -> float:
    """Adds up; late steps weigh more."""
    return sum(STEP[name] * 2.0**t for t, name in enumerate(schedule))


@pytest.fixture(scope="module")
def results() -> ScheduleResults:
    settings = {"steps": 4, "levels": LEVELS}
    found = [search_schedule(error, **settings, max_cost=c) for c in (0.4, 0.6)]
    also = hand_set(error, **settings, max_cost=0.4).values()
    added = check_additivity(error, **settings, schedules=10)
    return results_of(found, LEVELS, "made up", also=also, added=added, metadata={"prompts": 3})


def test_a_file_gives_the_same_results(results, tmp_path):
    results.save(tmp_path / "r.json")
    assert ScheduleResults.load(tmp_path / "r.json") == results


def test_names_say_how_a_schedule_was_made(results):
    assert results.named["uniform W4"] == ("W4",) * 4
    assert results.named["last 2 W8/W4"] == ("W4", "W4", "W8", "W8")
    assert results.named["first 2 W8/W4"] == ("W8", "W8", "W4", "W4")
    best = [n for n in results.named if n.startswith("found at")]
    assert len(best) == 2 and all(results.cost(results.named[n]) <= 0.6 for n in best)
    assert all(e == error(s) for s, e in results.measured.items())


def test_single_steps_are_their_own_errors_and_intervals_are_shared():
    precise, coarse = ("16",) * 4, ("16", "16", "W8", "W8")
    measured = {
        precise: 0.5,
        ("W8",) * 4: 15.5,
        coarse: 12.5,
        ("16", "16", "16", "W8"): 8.5,
        ("W8", "16", "16", "W8"): 9.0,
    }
    shares = ScheduleResults(levels=LEVELS, metric="m", measured=measured).step_errors()
    assert shares == {"W8": [(15 / 4, 4), (15 / 4, 4), (6.0, 2), (8.0, 1)]}


def test_steps_that_no_interval_covers_leave_the_level_out():
    measured = {("16", "16"): 0.0, ("16", "W4"): 1.0}
    assert ScheduleResults(levels=LEVELS, metric="m", measured=measured).step_errors() == {}


def check(name: str, **changes):
    return lambda d: d["additivity"][name].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(extra=1), "expected an object with exactly format"),
        (lambda d: d.pop("named"), "expected an object with exactly format"),
        (lambda d: d.update(version=2), "this release reads version 1"),
        (lambda d: d.update(measured={}), "measured is empty"),
        (lambda d: d.update(measured=[1]), "measured is \\[1\\], expected dict"),
        (lambda d: d.update(metric=3), "metric is 3, expected str"),
        (lambda d: d["measured"].update({"0 1": 1.0}), "expected 4 levels out of 16, W8, W4"),
        (lambda d: d["measured"].update({"0 1 2 3": 1.0}), "'0 1 2 3': expected places of levels, 0 to 2"),
        (lambda d: d["measured"].update({"0 1 1 1": "x"}), "error is 'x', expected a finite number"),
        (lambda d: d["measured"].update({"0 1 1 1": 10**400}), "expected a finite number"),
        (lambda d: d["measured"].update({"0 1 1 1": True}), "error is True"),
        (
            lambda d: d["named"].update(a=d["named"]["uniform W4"]) or d["measured"].pop("2 2 2 2"),
            "W4' was not measured",
        ),
        (lambda d: d["named"].update(a=[2, 1]), "expected places of levels"),
        (lambda d: d["levels"][1].update(name="16"), "expected a text of its own"),
        (lambda d: d["levels"][1].update(cost=2.0), "levels go from precise to cheap"),
        (lambda d: d["levels"][1].update(cost=10**400), "level 'W8': cost is 1000"),
        (lambda d: d["levels"].append(3), "levels, 3: is int"),
        (lambda d: d.update(additivity=[]), "additivity is \\[\\]"),
        (lambda d: d["additivity"].update(b={}), "additivity, 'b': is \\[\\]"),
        (check("made up", predicted=[1.0]), "differ in length"),
        (check("made up", measured=["x"] * 10), "'made up': measured: expected finite numbers"),
        (check("made up", singles={"W8": [10**400]}), "'made up': W8: expected finite numbers"),
        (check("made up", singles=3), "a list of schedules and an object of singles"),
        (check("made up", ratio=None), "r_squared and ratio: expected finite numbers"),
        (check("made up", r_squared="x"), "r_squared and ratio: expected finite numbers"),
    ],
)
def test_a_broken_file_is_named_with_what_was_expected(results, tmp_path, change, words):
    document = json.loads(json.dumps(results.to_json()))
    change(document)
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(ScheduleError, match=words) as caught:
        ScheduleResults.load(tmp_path / "r.json")
    assert "r.json" in str(caught.value)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ScheduleError, match="error is nan"):
        ScheduleResults(levels=LEVELS, metric="m", measured={("16",): math.nan})
