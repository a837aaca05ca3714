"""The report's pages of schedules and of correlations: there when their files are, escaped, true to the figures."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixdq_ao.app.report import build
from mixdq_ao.app.report.chart import LogScale
from mixdq_ao.app.report.orthogonality import png
from mixdq_ao.errors import MixDQError
from mixdq_ao.plan import LayerPlan, Plan
from mixdq_ao.search.orthogonality import Orthogonality
from mixdq_ao.temporal.plan import TemporalPlan
from mixdq_ao.temporal.results import Additivity, ScheduleResults

from .synthetic import HOSTILE, layer_names, sensitivity
from .test_report import Balanced

LEVELS = {"16": 1.0, "W8A8": 0.5, "W4A8": 0.25, "W3A8": 0.19, "W2A8": 0.14}


def schedule(steps: int = 8, levels: dict[str, float] | None = None) -> TemporalPlan:
    costs = levels or LEVELS
    plans = {n: None if k == 0 else Plan({"a": LayerPlan(weight_bits=8)}) for k, n in enumerate(costs)}
    names = list(costs)
    chosen = tuple(names[min(len(names) - 1, (steps - t) * len(names) // (steps + 1))] for t in range(steps))
    return TemporalPlan(plans, chosen, costs, {"error": 0.0123, "metric": "ssim"})


def results(steps: int = 8, levels: dict[str, float] | None = None) -> ScheduleResults:
    """Made up: errors add up to a factor, late steps weigh more."""
    costs, rng = levels or LEVELS, random.Random(0)
    names = list(costs)
    single = {n: [0.0 if k == 0 else 4.0**k * 1e-5 * 1.4**t for t in range(steps)] for k, n in enumerate(names)}

    def error(s):
        return sum(single[n][t] for t, n in enumerate(s)) * (1.2 if len(set(s)) > 2 else 1.0)

    drawn = [tuple(rng.choice(names) for _ in range(steps)) for _ in range(40)]
    alone = {(names[0],) * t + (n,) + (names[0],) * (steps - t - 1) for n in names[1:-1] for t in range(steps)}
    halves = {(names[0],) * a + (names[-1],) * 2 + (names[0],) * (steps - a - 2) for a in range(0, steps, 2)}
    named = {f"uniform {n}": (n,) * steps for n in names}
    named |= {f"last {n} {names[0]}/{names[2]}": (names[2],) * (steps - n) + (names[0],) * n for n in (1, 2, 3)}
    named |= {f"first {n} {names[0]}/{names[2]}": (names[0],) * n + (names[2],) * (steps - n) for n in (1, 2, 3)}
    named |= {
        f"found at {c}": schedule(steps, levels).steps[-s:] + schedule(steps, levels).steps[:-s]
        for c, s in ((0.3, 1), (0.4, 2))
    }
    measured = {s: error(s) for s in [*drawn, *alone, *halves, *named.values()]}
    predicted = [sum(single[n][t] for t, n in enumerate(s)) for s in drawn]
    added = Additivity(tuple(drawn), tuple(predicted), tuple(error(s) for s in drawn), {}, 0.97, 1.2)
    return ScheduleResults(
        levels=costs, metric="1 - SSIM", measured=measured, named=named, additivity={"1 - SSIM": added, "MSE": added}
    )


def correlations(names: list[str], sampled: int = 4) -> Orthogonality:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(sampled, len(names), 6)) + 0.7
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    matrices = np.clip(np.abs(features @ features.transpose(0, 2, 1)).round(6), -1, 1)
    matrices[:, 1], matrices[:, :, 1] = 0, 0
    return Orthogonality(
        sensitivity(names).layers, sampled, tuple(range(sampled)), np.maximum(matrices, matrices.transpose(0, 2, 1))
    )


@pytest.fixture(scope="module")
def _folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("schedules")
    schedule().save(path / "schedule_0.3.json")
    results().save(path / "schedule_results.json")
    correlations(layer_names()[:40]).save(path / "orthogonality.json")
    return path


@pytest.fixture
def folder(_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_folder, tmp_path / "results"))


def page_of(folder: Path) -> str:
    return build(folder).read_text(encoding="utf-8").replace("\u00a0", " ")


def test_sections_are_there_when_their_files_are(folder):
    page = Balanced(page_of(folder))
    assert {"schedule", "orthogonality"} <= set(page.ids)
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    (folder / "orthogonality.json").unlink()
    assert "orthogonality" not in Balanced(page_of(folder)).ids
    (folder / "schedule_results.json").unlink()
    assert "schedule" in Balanced(page_of(folder)).ids
    (folder / "schedule_0.3.json").unlink()
    with pytest.raises(MixDQError, match="nothing to report.*schedule"):
        build(folder)


def test_what_a_reader_looks_for(folder):
    text = page_of(folder)
    assert "8 steps, cost" in text and "error 0.0123" in text and 'title="step 8: 16"' in text
    assert "R² of the logarithms is 0.970, measured errors are 1.20 times" in text
    assert "found at 0.3: cost" in text and "uniform W4A8: cost" in text
    assert f"step 8 at W8A8: {4e-5 * 1.4**7:.1e}" in text and "shared by 2 steps" in text
    assert "correlate with none: 1." in text and "step 4" in text


def test_every_measured_schedule_with_an_error_is_a_dot(folder):
    dots = re.search(r'<g class="dots">(.*?)</g>', page_of(folder))
    assert dots is not None
    assert dots[1].count("<circle") == sum(e > 0 for e in results().measured.values())


def test_the_picture_holds_the_matrix():
    matrix = np.array([[1.0, 0.0], [0.5, 1.0]])
    data = base64.b64decode(png(matrix, 0.0).removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == (2, 2, 3)
    assert pixels[0, 1].tolist() == [68, 1, 84] and pixels[0, 0].tolist() == [253, 231, 37]
    assert pixels[1, 0].tolist() == [51, 144, 132]  # half way between the middle colours


def test_errors_of_nothing_but_zero_leave_the_charts_out(tmp_path):
    ScheduleResults(levels=LEVELS, metric="m", measured={("16",): 0.0, ("W8A8",): 0.0}).save(tmp_path / "schedule.json")
    text = page_of(tmp_path)
    assert "Nothing of that kind was measured" in text and "is without error" in text


def test_a_sum_that_predicts_nothing_is_said_to(tmp_path):
    document = results().to_json()
    document["additivity"]["MSE"]["r_squared"] = 0.4
    (tmp_path / "schedule_results.json").write_text(json.dumps(document))
    assert "MSE: R² of the logarithms is 0.400" in page_of(tmp_path) and "is no good guide here" in page_of(tmp_path)


def test_equal_errors_tell_nothing_of_a_sum(tmp_path):
    document = results().to_json()
    document["additivity"]["MSE"]["r_squared"] = None
    (tmp_path / "schedule_results.json").write_text(json.dumps(document))
    assert "MSE: R² of the logarithms is not defined, as all are equal" in page_of(tmp_path)


def test_hostile_names_are_text(tmp_path):
    levels = {HOSTILE: 1.0, '"><img src=x>': 0.5, "c": 0.2}
    schedule(8, levels).save(tmp_path / "schedule_x.json")
    results(8, levels).save(tmp_path / "schedule_results.json")
    correlations([HOSTILE, '"><img src=x>', "conv_in", "conv_out"]).save(tmp_path / "orthogonality.json")
    page = Balanced(page_of(tmp_path))
    assert page.tags.count("script") == 1 and page.tags.count("img") == 4  # four steps of the matrix


@pytest.mark.parametrize("name", ["schedule_0.3.json", "schedule_results.json", "orthogonality.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": "mixdq-plan", "version": 1}'])
def test_a_broken_file_is_one_clear_error(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(MixDQError, match=re.escape(name)):
        build(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.9e-4, 1.1e-1, ["1e-4", "0.001", "0.01", "0.1"]), (0.15, 0.7, ["0.2", "0.5"]), (1, 1e9, None)],
)
def test_logarithmic_ticks(low, high, ticks):
    scale = LogScale(low, high, 0, 100)
    shown = [scale.text(t) for t in scale.ticks()]
    assert shown == ticks if ticks else 4 <= len(shown) <= 8
    assert scale(low) == 0 and scale(high) == pytest.approx(100) and scale((low * high) ** 0.5) == pytest.approx(50)
