"""What an analysis is asked for: its part of a store's fingerprint is what stores on disk were made with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mixdq_ao import Sampling, SensitivityError, calibrate
from mixdq_ao.search.analysis import Analysis
from mixdq_ao.search.calibration import layer_to_json
from mixdq_ao.search.distributed import RayWorkers
from mixdq_ao.search.fingerprint import fingerprint
from mixdq_ao.search.moments_file import fingerprint_of
from mixdq_ao.search.store import Store

from .test_distributed import PROMPTS, Pipe


def analysis(pipe: Pipe, **fields: Any) -> Analysis:
    common: dict[str, Any] = {"sampling": Sampling(batch_size=2), "weight_bits": (2, 4), "act_bits": (8,)}
    return Analysis(pipe=pipe, prompts=PROMPTS, calibration=calibrate(pipe, PROMPTS), **{**common, **fields})


def as_on_disk(analysis: Analysis) -> dict[str, Any]:
    """Every key, spelled out: one more, one less or another name and no store made before continues."""
    sizes = {"height": None, "width": None, "frames": None}
    return {
        "calibration": {"bos": None, "layers": {n: layer_to_json(v) for n, v in analysis.calibration.layers.items()}},
        "sampling": {"batch_size": 2, "guidance_scale": 0.0, "seed": 0, "steps": 1, **sizes},
        "prompts": ["one", "two", "three"],
    }


def test_settings_are_those_of_stores_on_disk():
    plain = analysis(Pipe())
    known, moments = as_on_disk(plain), {"linear": torch.eye(12), "other": 2 * torch.eye(3)}
    assert plain.settings() == known
    assert replace(plain, moments=moments, budget=1, weight_bits=(8,)).settings() == known
    ways = ("minmax nearest", "output compensated")
    assert replace(plain, roundings=ways).settings() == known | {"roundings": list(ways)}
    assert replace(plain, roundings=ways[1:], moments=moments).settings() == known | {
        "moments": fingerprint_of(moments),
        "roundings": ["output compensated"],
    }
    own = plain.settings(method="probe 2", bits=plain.bits, content=["conv"])
    assert own == known | {"method": "probe 2", "bits": [[2, 4], [8]], "content": ["conv"]}


def test_halves_of_a_split_count():
    """Stores of models with split inputs hold activations tried with one range, unless they say otherwise."""
    plain = analysis(Pipe())
    halves = {"split": 1, "first_range": (0.0, 1.0), "second_range": (0.0, 2.0)}
    layers = {n: replace(v, **halves) for n, v in plain.calibration.layers.items()}
    split = replace(plain, calibration=replace(plain.calibration, layers=layers))
    assert split.settings() == as_on_disk(split) | {"split": "weight and act"}


def test_a_store_made_with_them_continues(tmp_path):
    pipe = Pipe()
    asked = analysis(pipe, store=tmp_path / "store")
    with Store(tmp_path / "store", fingerprint(pipe.unet, as_on_disk(asked))) as store:
        store.put("conv|weight|2", {"error": 0.25})
    with asked.results(asked.settings()) as results:
        assert results.get("conv|weight|2") == {"error": 0.25}
    with pytest.raises(SensitivityError, match="other prompts or other settings"), asked.results({"prompts": []}):
        pass


def test_metadata_says_how():
    found = analysis(Pipe(), sampling=Sampling(steps=4, seed=7)).metadata("probe", precision=0.9)
    assert list(found) == ["prompts", "sampling", "method", "precision"]
    assert found["prompts"] == 3 and found["method"] == "probe" and found["precision"] == 0.9
    assert found["sampling"]["steps"] == 4 and found["sampling"]["seed"] == 7


def test_only_what_goes_away_is_checked(monkeypatch):
    """Items are worked on with what is built of the pipeline here; on workers, of theirs, which has to be the same."""
    sent: list[Any] = []
    monkeypatch.setattr("mixdq_ao.search.analysis.pool_of", lambda workers, pipe, build: sent.append(build))
    pipe, other = Pipe(), Pipe()
    with torch.no_grad():
        other.unet.linear.bias[0] += 1e-3
    here, away, asked = (lambda _: lambda item: ("here", item)), (lambda _: lambda item: ("away", item)), analysis(pipe)
    with asked.results(asked.settings()) as results:
        asked.pool(here, away, asked.settings(), results)
        replace(asked, workers=RayWorkers(count=1)).pool(here, away, asked.settings(), results)
    assert sent[0](other)(1) == ("here", 1) and sent[1](pipe)(2) == ("away", 2)
    with pytest.raises(SensitivityError, match="is not the one that is analyzed"):
        sent[1](other)
