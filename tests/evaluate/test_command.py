"""mixdq evaluate: its errors in one line, before anything is drawn."""

from __future__ import annotations

import json

import pytest
import torch

from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import Gaussian, measure_real, real_files
from mixdq_ao.evaluate.resize import to_pillow
from mixdq_ao.evaluate.settings import digest_files
from mixdq_ao.evaluate.weights import package
from tests.command import run

from .conftest import pictures


def flat(images):
    """Features for the command: [B, 3]."""
    return images.float().mean((2, 3))


def test_errors_are_one_line(capsys, shapes, tmp_path):
    prompts, pipeline = tmp_path / "p.txt", shapes.PIPELINE
    prompts.write_text("a circle\na square\n")
    Gaussian(torch.zeros(3), torch.eye(3), 9).save(tmp_path / "real.safetensors", "others")
    start = ("evaluate", "run", pipeline, "--prompts", prompts, "--out", tmp_path / "run")
    real = ("--real", tmp_path / "real.safetensors")
    own = ("--features", f"{__name__}:flat")
    cases = [
        ((*start, "--shard", "3/2"), "part is 3/2, expected one from 1/2 to 2/2"),
        ((*start, "--count", "3"), "count is 3, expected 1 to 2"),
        ((*start,), "ssim compares with full precision"),
        ((*start, "--metrics", "beauty"), "metric 'beauty' is unknown, expected some of fid, clip"),
        ((*start, "--metrics", "fid"), "--real is not given; expected a file of mixdq evaluate real"),
        ((*start, "--metrics", "fid", *real), "--inception is not given; expected weights-inception-2015-12-05"),
        ((*start, "--metrics", "fid", *real, *own), "was made by features 'others', expected 'tests.evaluate"),
        ((*start, "--metrics", "fid", *real, "--features", "nowhere"), "is 'nowhere', expected module:function"),
        ((*start, "--metrics", "fid", *real, "--features", "no.where:f"), "no.where:f: cannot be imported"),
        ((*start, "--metrics", "imagereward"), "--imagereward is not given; expected ImageReward.pt"),
        ((*start, "--metrics", "clip", "--clip", tmp_path / "none"), "none: cannot be loaded for CLIPScore"),
        ((*start, "--metrics", "ssim", "--reference", tmp_path / "none"), "run.json: cannot be read"),
        ((*start, "--plan", prompts), "p.txt: not valid JSON"),
        (("evaluate", "real", tmp_path / "none", *own), "is no directory, expected one with real pictures"),
        (("evaluate", "real", tmp_path, *own), "holds 0 pictures, expected two at least"),
        (("evaluate", "real", tmp_path, *own, "--prompts", prompts), "p.txt: names no pictures"),
        (("evaluate", "table", tmp_path), "has no results.json"),
    ]
    for arguments, words in cases:
        code, out, err = run(capsys, *arguments)
        assert code == 2 and out == "" and words in err and err.count("\n") == 1, (arguments, err)
    assert not (tmp_path / "run").exists()


def test_features_of_real_pictures_resume(capsys, tmp_path, monkeypatch):
    images = [*pictures(5), *pictures(2, side=30, seed=1)]
    for i, image in enumerate(images):
        to_pillow(image).save(tmp_path / f"{i}.png")
    expected = Gaussian.of(torch.stack([flat(image[None])[0] for image in images]))
    command = ("evaluate", "real", tmp_path, "--features", f"{__name__}:flat", "--batch-size", 2)
    seen = []

    def stops(images):
        seen.append(len(images))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return honest(images)

    honest = flat
    monkeypatch.setitem(globals(), "flat", stops)
    assert run(capsys, *command, "--out", tmp_path / "r.safetensors")[0] == 130
    monkeypatch.undo()
    monkeypatch.setattr("mixdq_ao.evaluate.choose._custom", lambda spec: lambda x: seen.append(len(x)) or flat(x))
    code, _, err = run(capsys, *command, "--out", tmp_path / "r.safetensors")
    assert code == 0, err
    assert seen[:3] == [2, 2, 1] and sum(seen[3:]) == 3
    found = Gaussian.load(tmp_path / "r.safetensors", f"{__name__}:flat")
    assert found.count == 7 and torch.allclose(found.mean, expected.mean)
    assert torch.allclose(found.covariance, expected.covariance) and not (tmp_path / "r.part").exists()


def test_features_of_other_pictures_are_not_taken(tmp_path):
    """Under the same names and sizes; the same pictures elsewhere go on."""
    for name, seed in (("a", 0), ("b", 1), ("copy", 0)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pictures(3, seed=seed)):
            to_pillow(image).save(tmp_path / name / f"{i}.bmp")
    seen, out = [], tmp_path / "r.safetensors"

    def stops(images):
        seen.append(len(images))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return flat(images)

    with pytest.raises(KeyboardInterrupt):
        measure_real(real_files(tmp_path / "a"), stops, out, batch_size=2)
    with pytest.raises(MixDQError, match=r"r\.part: holds rows of .* choose another directory, or delete the file"):
        measure_real(real_files(tmp_path / "b"), flat, out, batch_size=2)
    found = measure_real(real_files(tmp_path / "copy"), stops, out, batch_size=2)
    assert seen == [2, 1, 1] and torch.allclose(found.mean, flat(pictures(3)).double().mean(0))
    assert digest_files([("\udcff", tmp_path / "b" / "0.bmp")])  # a name that is no UTF-8, as old archives have
    with pytest.raises(MixDQError, match=r"none\.png: cannot be read: No such file"):
        measure_real([tmp_path / "none.png"] * 2, flat, out)


def test_the_reference_may_hold_more_pictures(capsys, shapes, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a circle\na square\na triangle\n")
    start = ("evaluate", "run", shapes.PIPELINE, "--prompts", prompts, "--height", 32, "--width", 32)
    assert run(capsys, *start, "--metrics", "none", "--out", tmp_path / "all")[0] == 0
    two = (*start, "--count", 2, "--metrics", "psnr", "--reference", tmp_path / "all", "--out", tmp_path / "two")
    code, out, err = run(capsys, *two, "--json")
    assert code == 0, err
    assert json.loads(out)["two"]["psnr"]["pictures"] == 2 and json.loads(out)["two"]["psnr"]["value"] > 40
    prompts.write_text("a circle\na square\na star\n")
    code, _, err = run(capsys, *two)
    assert code == 2 and "all: prompts is " in err


def test_prompts_as_text(capsys, tmp_path):
    (tmp_path / "meta_data.json").write_text(
        json.dumps({k: {"category": "c", "prompt": f"prompt\n{k}"} for k in "abc"})
    )
    out = tmp_path / "deep" / "p.txt"
    assert run(capsys, "evaluate", "prompts", tmp_path / "meta_data.json", "--last", 2, "--out", out)[0] == 0
    assert out.read_text() == "prompt b\nprompt c\n"
    assert run(capsys, "evaluate", "prompts", tmp_path / "meta_data.json", "--out", out)[0] == 0
    assert out.read_text().count("\n") == 3


def test_a_package_that_is_missing_is_named():
    with pytest.raises(MixDQError, match=r"FID needs the package torch_no .*pip install .*mixdq-ao\[evaluate\]"):
        package("torch_no.fidelity", "FID")
