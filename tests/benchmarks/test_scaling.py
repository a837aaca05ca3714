"""Exponents of growth and their chart."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks.scaling import STAGES, exponent, exponents, markdown, series, svg


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_power_law_is_found(power):
    sizes = [70, 150, 350, 830, 2030, 4430]
    found = exponent(sizes, [0.01 * s**power for s in sizes])
    assert found == pytest.approx({"slope": power, "low": power, "high": power}, abs=1e-6)


def test_a_fixed_cost_weighs_little_in_the_larger_half():
    sizes = [1, 3, 8, 20, 50, 110]
    assert exponent(sizes, [0.5 + s for s in sizes])["slope"] == pytest.approx(1, abs=0.05)


def test_the_interval_holds_the_slope_about_as_often_as_it_says():
    rng, sizes, held = np.random.default_rng(0), [1, 2, 4, 8, 16, 32], 0
    for _ in range(300):
        found = exponent(sizes, [s * np.exp(rng.normal(0, 0.1)) for s in sizes])
        held += found["low"] <= 1 <= found["high"]
    assert 0.91 <= held / 300 <= 0.99


def test_too_few_sizes_have_no_exponent():
    assert exponent([1, 2], [1, 2]) is None


def test_chart_and_table():
    rows = [{"layers": n, "parameters": 100 * n, **{s: 0.1 * n for s in STAGES[:4]}} for n in (1, 8, 64)]
    rows[0]["compile whole"] = 3.0
    growth = {"layers": rows, "parameters": rows}
    root = ElementTree.fromstring(svg(growth))
    paths = root.findall(".//{http://www.w3.org/2000/svg}path")
    assert len(paths) == 2 * len(STAGES) and "nan" not in svg(growth)
    assert series(rows, "layers", "compile whole") == ([1], [3.0])
    environment = {"processor": "A", "cpu_capability": "AVX2", "packages": {"torch": "2"}, "commit": "c"}
    text = markdown(growth, {"environment": environment, "exponents": exponents(growth), "command": "c"})
    assert "1.00 [1.00, 1.00]" in text and text.count("**exponent**") == 2
