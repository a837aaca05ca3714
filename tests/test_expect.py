"""Checks of arguments and fields."""

import math

import pytest

from mixdq_ao.errors import MixDQError, PlanError, ScheduleError
from mixdq_ao.expect import expect, is_number, located, whole


def test_expect_names_field_value_and_expectation():
    expect(True, "bits", 3, "2, 4 or 8")
    with pytest.raises(PlanError, match=r"^bits is 3, expected 2, 4 or 8$"):
        expect(False, "bits", 3, "2, 4 or 8", PlanError)
    with pytest.raises(MixDQError) as raised:
        expect(False, "text", "a" * 10_000, "less")
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "2", math.nan])
def test_what_is_no_whole_number_of_at_least_one(value):
    with pytest.raises(ScheduleError, match="steps is .*, expected a whole number of at least 1"):
        whole(value, "steps", error=ScheduleError)


def test_whole_numbers():
    assert whole(1, "steps") == 1 and whole(0, "steps", least=0) == 0
    with pytest.raises(MixDQError, match="at least 3"):
        whole(2, "steps", least=3)


@pytest.mark.parametrize("value, expected", [(1, True), (1.5, True), (-0.0, True), (True, False), (None, False),
    ("1", False), (math.nan, False), (math.inf, False), (10**400, False), (2**53, True)])  # fmt: skip
def test_is_number(value, expected):
    assert is_number(value) is expected


def test_located_keeps_the_kind_and_passes_others_on():
    with pytest.raises(PlanError, match=r"^layer 'a': bits$") as raised, located("layer 'a'", PlanError):
        raise PlanError("bits")
    assert isinstance(raised.value.__cause__, PlanError)
    with pytest.raises(ScheduleError, match="^other$"), located("layer 'a'", PlanError):
        raise ScheduleError("other")
