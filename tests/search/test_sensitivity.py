"""Sensitivity files: round trip, refusal of what is wrong, import of the published ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixdq_ao.errors import SensitivityError
from mixdq_ao.search.sensitivity import LayerSensitivity, Sensitivity, error_from_sqnr, sqnr_from_error
from tests.published import needs_published, sensitivity


def small() -> Sensitivity:
    content = LayerSensitivity(
        group="content",
        weight_size=64,
        act_size=8,
        weight_scores={2: 0.9, 4: 0.99, 8: 1.0},
        act_scores={4: 0.95, 8: 0.999},
        weight_errors={2: 1e-2, 4: 1e-3, 8: 0.0},
        act_errors={4: 1e-3, 8: 1e-5},
        weight_bytes={2: 20, 4: 36, 8: 72},
    )
    quality = LayerSensitivity(group="quality", weight_size=32, act_size=16, weight_scores={4: 40.0, 8: 60.0})
    return Sensitivity({"ff": content, "conv": quality}, {"note": "x", "noise_floor": 1e-9})


def test_round_trip(tmp_path: Path) -> None:
    small().save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == small()


def test_sqnr_of_any_layer() -> None:
    layers = small().layers
    assert layers["ff"].sqnr("weight") == pytest.approx({2: 20.0, 4: 30.0, 8: 120.0})
    assert layers["conv"].sqnr("weight") == {4: 40.0, 8: 60.0}
    assert LayerSensitivity(group="content", weight_size=1, act_size=1, weight_scores={4: 1.0}).sqnr("weight") == {}
    assert sqnr_from_error(error_from_sqnr(37.5)) == pytest.approx(37.5)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "mixdq-plan", "format is 'mixdq-plan'"),
        (["version"], 2, "version is 2"),
        (["version"], True, "version is True"),
        (["extra"], 1, "unknown key 'extra'"),
        (["metadata"], [], "metadata is list"),
        (["metadata", "noise_floor"], -1, "noise_floor is -1"),
        (["layers"], {}, "layers is empty"),
        (["layers"], None, "layers is NoneType"),
        (["layers", "ff"], 3, "layer 'ff': is int"),
        (["layers", "ff", "group"], "colour", "layer 'ff': group is 'colour'"),
        (["layers", "ff", "group"], [], "layer 'ff': group is"),
        (["layers", "ff", "weight_size"], 0, "layer 'ff': weight_size is 0"),
        (["layers", "ff", "weight_size"], 6.0, "weight_size is 6.0"),
        (["layers", "ff", "act_size"], True, "act_size is True"),
        (["layers", "ff", "act_size"], {"2": 1}, "act_size is"),
        (["layers", "ff", "act_size"], 2**60, "act_size is"),
        (["layers", "ff", "weight_scores"], [1], "weight_scores is list"),
        (["layers", "ff", "weight_scores", "3"], 1.0, "weight_scores: bits '3'"),
        (["layers", "ff", "weight_scores", "4"], "0.9", "weight_scores at 4 bits is '0.9'"),
        (["layers", "ff", "weight_scores", "4"], 10**400, "weight_scores at 4 bits is 1000"),
        (
            ["layers", "ff", "weight_errors", "4"],
            -1e-9,
            "weight_errors at 4 bits is -1e-09, expected a finite number >= 0",
        ),
        (["layers", "ff", "weight_bytes", "4"], 1.5, "weight_bytes at 4 bits is 1.5"),
        (["layers", "ff", "bits"], 4, "layer 'ff': unknown field 'bits'"),
    ],
)
def test_wrong_field_is_named(tmp_path: Path, path: list[str], value: Any, message: str) -> None:
    document = small().to_json()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(SensitivityError, match=message) as error:
        Sensitivity.load(tmp_path / "bad.json")
    assert "bad.json" in str(error.value)


def test_missing_field_and_non_numbers(tmp_path: Path) -> None:
    document = small().to_json()
    del document["layers"]["conv"]["weight_size"]
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(SensitivityError, match="layer 'conv': missing field 'weight_size'"):
        Sensitivity.load(tmp_path / "a.json")
    for constant in ("NaN", "Infinity", "1e999"):
        (tmp_path / "b.json").write_text(json.dumps(small().to_json()).replace("0.99", constant, 1))
        with pytest.raises(SensitivityError, match="b.json"):
            Sensitivity.load(tmp_path / "b.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_loads_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    document = copy.deepcopy(small().to_json())
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    (tmp_path / "fuzz.json").write_text(json.dumps(document))
    _loads_or_refuses(tmp_path / "fuzz.json")


@FUZZ
@given(cut=st.integers(0, 2000), junk=st.binary(max_size=20))
def test_truncated_and_overwritten_files(tmp_path: Path, cut: int, junk: bytes) -> None:
    whole = json.dumps(small().to_json()).encode()
    (tmp_path / "fuzz.json").write_bytes(whole[:cut] + junk + whole[cut + len(junk) :][: cut // 2])
    _loads_or_refuses(tmp_path / "fuzz.json")


def _loads_or_refuses(path: Path) -> None:
    try:
        loaded = Sensitivity.load(path)
    except SensitivityError as error:
        assert path.name in str(error)
    else:
        loaded.save(path)
        assert Sensitivity.load(path) == loaded


@needs_published
def test_published_files() -> None:
    layers = sensitivity().layers
    assert len(layers) == 794
    assert sum(layer.group == "content" for layer in layers.values()) == 420
    assert sum(layer.weight_size for layer in layers.values()) == 2_565_880_320
    assert layers["conv_in"].weight_size == 11520 and layers["conv_in"].act_size == 4 * 64 * 64
    assert layers["conv_out"].weight_errors[8] == pytest.approx(10**-5.01, rel=0.02)
    assert sensitivity().noise_floor == pytest.approx(4.5e-9, rel=0.05)


NAMES = ("weight_ssim", "weight_sqnr", "act_ssim", "act_sqnr", "weight_ratio", "act_ratio")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    texts = {
        "weight_ssim": "model.ff: [0.5, 0.9, 1.0]\n",
        "weight_sqnr": "model.ff: [10, 30, 60]\nmodel.conv: [20, 40.5, 70]\n",
        "act_ssim": "model.ff: [0.5, 0.9, 1.0]\n",
        "act_sqnr": "model.ff: [10, 30, 60]\nmodel.conv: [20, 40, 70]\n",
        "weight_ratio": "model.ff: 2\nmodel.conv: 1.0\n",
        "act_ratio": "model.ff: 1.5\nmodel.conv: 1\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return {name: tmp_path / f"{name}.yaml" for name in NAMES}


def test_import_of_small_files(files: dict[str, Path]) -> None:
    layers = Sensitivity.from_mixdq_yaml(**files).layers
    assert layers["ff"].group == "content" and layers["conv"].group == "quality"
    assert layers["ff"].weight_size == 23040 and layers["ff"].act_size == 480
    assert layers["ff"].weight_scores == {2: 0.5, 4: 0.9, 8: 1.0}
    assert layers["ff"].weight_errors == pytest.approx({2: 0.1, 4: 1e-3, 8: 1e-6})
    assert layers["conv"].weight_scores[4] == 40.5


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("weight_ssim", "model.ff: [0.5, 0.9]", "layer 'ff'.*expected three finite numbers"),
        ("weight_ssim", "model.ff: [0.5, 0.9, .inf]", "expected three finite numbers"),
        ("weight_ssim", "model.ff: 3", "expected three finite numbers"),
        ("weight_ssim", "model.gg: [1, 1, 1]", "act_ssim.yaml: layer 'gg' is missing|'ff' is missing"),
        ("act_sqnr", "model.ff: [10, 30, 60]", "act_sqnr.yaml: layer 'conv' is missing"),
        ("act_ratio", "model.ff: 1\nmodel.conv: 1\nmodel.x: 1", "weight_sqnr.yaml: layer 'x' is missing"),
        ("weight_ratio", "model.ff: 1\nmodel.conv: 0", "weight_ratio.yaml: layer 'conv': size is 0"),
        ("weight_ratio", "model.ff: 1\nmodel.conv: .nan", "size is nan"),
        ("weight_ratio", "model.ff: 1\nmodel.conv: true", "size is True"),
        ("act_ssim", "nonsense", "act_ssim.yaml: is str"),
    ],
)
def test_wrong_published_file(files: dict[str, Path], file: str, text: str, message: str) -> None:
    files[file].write_text(text)
    with pytest.raises(SensitivityError, match=message):
        Sensitivity.from_mixdq_yaml(**files)
