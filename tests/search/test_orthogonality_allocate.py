"""Bits from importances: every form against enumeration, the linear program, budgets kept, bad input named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixdq_ao import AllocationError, LayerSensitivity, Orthogonality, SensitivityError, allocate_orthogonal
from mixdq_ao.search.orthogonality_allocate import choose, worth

BITS = (2, 4, 8)


def measured(layers: int = 6, sampled: tuple[int, ...] = (0, 1), steps: int = 2, seed: int = 0) -> Orthogonality:
    draw = np.random.default_rng(seed)
    half = draw.uniform(-0.3, 0.9, (len(sampled), layers, layers))
    matrices = (half + half.transpose(0, 2, 1)) / 2
    matrices[:, range(layers), range(layers)] = 1.0
    sizes = draw.integers(50, 5000, (layers, 2))
    held = lambda size: {b: int(size) * b // 8 + 40 for b in BITS}  # noqa: E731
    rows = {
        f"l{i}": LayerSensitivity(group="quality", weight_size=int(w), act_size=int(a), weight_bytes=held(w))
        for i, (w, a) in enumerate(sizes)
    }
    return Orthogonality(rows, steps, sampled, matrices.round(6))


@pytest.mark.parametrize("form", ["integer", "error"])
@pytest.mark.parametrize("budget", [2.5, 4.0, 6.1])
def test_the_best_of_all_plans(form, budget):
    given = measured()
    theta = given.importance(beta=0.5)
    sizes = [v.weight_size for v in given.layers.values()]
    score = lambda bits: sum(t * worth(form, b) for t, b in zip(theta.values(), bits, strict=True))  # noqa: E731
    fits = [b for b in itertools.product(BITS, repeat=6) if np.dot(b, sizes) <= budget * sum(sizes)]
    found = allocate_orthogonal(given, weight_bits=budget, act_bits=8, form=form, beta=0.5)
    bits = [found.plan.layers[n].weight_bits for n in given.layers]
    assert np.dot(bits, sizes) <= budget * sum(sizes)
    assert score(bits) == pytest.approx(min(map(score, fits)), rel=1e-9)
    assert found.objective["weight"] == pytest.approx(abs(score(bits))) and found.status == "optimal"
    assert found.predicted_error is None and {v.act_bits for v in found.plan.layers.values()} == {8}


@pytest.mark.parametrize("budget", [2.0, 3.3, 5.0, 8.0])
def test_the_linear_program_gives_all_to_the_most_important_per_weight(budget):
    """A linear objective under one budget goes by rank of theta / size: highest bits first, one layer between."""
    given = measured(layers=9, seed=4)
    theta, sizes = given.importance(), {n: v.weight_size for n, v in given.layers.items()}
    found = allocate_orthogonal(given, weight_bits=budget, form="linear")
    left, expected = (budget - 2) * sum(sizes.values()), {}
    for name in sorted(sizes, key=lambda n: -theta[n] / sizes[n]):
        whole = 6 * sizes[name] <= left * (1 + 1e-9)
        expected[name] = 8 if whole else 4 if left >= 2 * sizes[name] * (1 - 1e-9) and left > 0 else 2
        left -= min(6 * sizes[name], left)
    assert {n: v.weight_bits for n, v in found.plan.layers.items()} == expected
    exact = allocate_orthogonal(given, weight_bits=budget, form="integer")
    assert found.objective["weight"] <= exact.objective["weight"] + 1e-9
    assert "linear program" in found.status and "linear" in found.plan.metadata["source"]


def of_sizes(weight: tuple[int, ...]) -> Orthogonality:
    rows = {f"l{i}": LayerSensitivity(group="quality", weight_size=w, act_size=10) for i, w in enumerate(weight)}
    return Orthogonality(rows, 1, (0,), np.eye(len(rows))[None])


@pytest.mark.parametrize(("budget", "bits"), [(4.2, 2), (4.5, 2), (4.667, 4), (5.0, 4), (7.9, 4), (8.0, 8)])
def test_the_layer_that_is_divided_is_rounded_down_to_offered_bits(budget, bits):
    """5 bits leave 4.4 to a layer, of which 4 are offered: the two ends of its mixture are 2 and 8."""
    theta = {"l0": 3.0, "l1": 2.0, "l2": 1.0}
    found = allocate_orthogonal(of_sizes((100, 100, 1000)), weight_bits=budget, form="linear", importance=theta)
    assert [v.weight_bits for v in found.plan.layers.values()] == [8, 8, bits]


def test_many_layers_are_rounded_down_one_by_one():
    draw = np.random.default_rng(0)
    cost = np.array(BITS) * draw.integers(100, 10**7, 2000)[:, None].astype(float)
    value = -np.array(BITS) * draw.uniform(0.1, 1, 2000)[:, None]
    for limit in cost.sum(0).mean() * np.linspace(0.6, 1.4, 5):
        choice = choose("linear", value, cost, limit, field="x", time_limit=60).choice
        left, expected = limit - cost[:, 0].sum(), np.zeros(2000, dtype=int)
        for i in np.argsort(value[:, 0] / cost[:, 0]):
            room = cost[i, 0] + left
            expected[i] = (cost[i] <= room).sum() - 1
            left -= min(cost[i, 2] - cost[i, 0], left)
        assert choice.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("act", "bits"),
    [
        ({"act_bits": 12, "act_choices": (8, 16)}, {8, 16}),
        ({"act_bits": 8, "act_choices": (4,)}, {4}),
        ({"act_bits": 9, "act_choices": (4, 16)}, {4, 16}),
        ({"act_bits": 12}, {8}),
        ({"act_bits": 16}, {16}),
        ({}, {8}),
    ],
)
def test_offered_activations_hold_from_8_bits_up(act, bits):
    found = allocate_orthogonal(measured(), weight_bits=6, **act)
    assert {v.act_bits for v in found.plan.layers.values()} == bits
    assert found.average_bits["act/quality"] <= act.get("act_bits", 8)


def test_weights_may_be_kept():
    found = allocate_orthogonal(measured(), weight_bits=16, act_bits=6)
    assert {v.weight_bits for v in found.plan.layers.values()} == {16}
    assert {v.act_bits for v in found.plan.layers.values()} == {4, 8}


def test_activations_ties_protection_and_bytes():
    given = measured()
    found = allocate_orthogonal(given, weight_bits=4, act_bits=6, protect=["l0"], tie=[["l1", "l2"]])
    layers = found.plan.layers
    assert (layers["l0"].weight_bits, layers["l0"].act_bits) == (16, 16)
    assert (layers["l1"].weight_bits, layers["l1"].act_bits) == (layers["l2"].weight_bits, layers["l2"].act_bits)
    assert {v.act_bits for n, v in layers.items() if n != "l0"} == {4, 8}
    assert found.average_bits["act/quality"] <= 6 and found.average_bits["weight/quality"] <= 4
    assert allocate_orthogonal(given, weight_bits=4, act_bits=16).plan.layers["l1"].act_bits == 16
    some = allocate_orthogonal(given, weight_bits=12, weight_choices=(4, 16), act_bits=6).plan.layers.values()
    assert {(v.weight_bits == 16, v.act_bits == 16) for v in some} == {(False, False), (True, True)}
    room = sum(v.weight_bytes[4] for v in given.layers.values())
    assert allocate_orthogonal(given, weight_bytes=room).weight_bytes <= room


def test_importances_may_be_given():
    given = measured()
    one = dict.fromkeys(given.layers, 1.0)
    favoured = allocate_orthogonal(given, weight_bits=4, importance=one | {"l3": 1e6}).plan.layers["l3"].weight_bits
    assert favoured == 8
    with pytest.raises(AllocationError, match="layer 'l0': importance is None"):
        allocate_orthogonal(given, weight_bits=4, importance={})


def test_bad_input():
    given = measured()
    for options, says in [
        ({"weight_bits": 1.5}, "weight_bits: no plan within the budget"),
        ({"weight_bits": 1.5, "form": "linear"}, "weight_bits: no plan within the budget"),
        ({"weight_bytes": 100}, "weight_bytes: no plan"),
        ({"weight_bits": 4, "form": "other"}, "form is 'other'"),
        ({"weight_bits": 4, "act_bits": 3}, "act_bits: no plan"),
        ({"weight_bits": {"content": 4, "quality": 4}}, "expected one number"),
        ({}, "exactly one of weight_bits"),
    ]:
        with pytest.raises(AllocationError, match=says):
            allocate_orthogonal(given, **options)
    with pytest.raises(SensitivityError, match="beta"):
        allocate_orthogonal(given, weight_bits=4, beta=-1)


def test_a_column_that_is_not_offered_is_not_taken():
    value, cost = np.array([[-5.0, np.inf], [-1.0, -2.0]]), np.array([[1.0, 0.0], [1.0, 2.0]])
    for form in ("linear", "integer"):
        assert choose(form, value, cost, 3.0, field="x", time_limit=5).choice.tolist() == [0, 1]
