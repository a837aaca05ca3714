"""Every mixdq command of examples/sdxl_turbo.md, as it stands there, on the bundled pipeline."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.layouts import SDXL
from mixdq_ao.app import cli
from mixdq_ao.evaluate import Results
from mixdq_ao.evaluate.resize import to_pillow
from mixdq_ao.layers import find_layers

PAGE = Path(__file__).parents[2] / "examples" / "sdxl_turbo.md"
COUNT = 3


def blocks(kind: str) -> list[str]:
    """Shell code of the page under ```sh, or ```sh <kind>."""
    return re.findall(rf"^```sh{' ' * bool(kind)}{kind}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def commands(settings: dict[str, str]) -> list[list[str]]:
    """Arguments of each command, with the settings in place, split as a shell does."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    found = [re.sub(r"\$(\w+)", lambda m: settings[m[1]], line) for line in lines]
    return [shlex.split(line) for line in found]


@pytest.fixture
def settings(tmp_path, shapes, _bundled, clip) -> dict[str, str]:
    """Stand-ins for what the page fetches."""
    from examples.shapes.data import picture

    chosen, rng = shapes.prompts(COUNT + 2, seed=8), random.Random(0)
    (tmp_path / "val").mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(chosen))]
    captions = [{"id": i, "image_id": i, "caption": p.text} for i, p in enumerate(chosen)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for i, prompt in enumerate(chosen[:COUNT]):
        photo = (picture(prompt.spec, rng).clamp(0, 1) * 255).byte()
        to_pillow(photo).save(tmp_path / "val" / f"{i}.jpg")
    layers = list(find_layers(_bundled.pipe.unet))
    for file, bits in (("weight/weight_8.00", 8), ("weight/weight_4.00", 4), ("act/act_7.77", 8)):
        path = tmp_path / "authors" / f"{file}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"model.{name}: {bits}\n" for name in layers))
    clip.model.save_pretrained(tmp_path / "clip")
    clip.tokenizer.save_pretrained(tmp_path / "clip")
    return {
        "PIPELINE": str(shapes.PIPELINE),
        "CAPTIONS": str(tmp_path / "captions.json"),
        "PHOTOS": str(tmp_path / "val"),
        "AUTHORS": str(tmp_path / "authors"),
        "FEATURES": "--features examples.shapes.subject:load_scorer",
        "TEXT": f"--clip {tmp_path / 'clip'}",
        "METRICS": "fid,clip",
        "NEAR": "ssim,psnr",
        "SIZE": "--height 64 --width 64",
        "BATCH": "2",
        "COUNT": str(COUNT),
        "OUT": str(tmp_path / "out"),
        "PROTECT": "conv_in conv_out",
    }


def test_the_page_sets_what_its_commands_use(settings):
    (block,) = blocks("settings")
    assert set(re.findall(r"^(\w+)=", block, re.M)) == set(settings)
    used = set(re.findall(r"\$(\w+)", "".join(blocks(""))))
    assert used == set(settings)
    assert all(arguments[0] == "mixdq" for arguments in commands(settings))


def test_what_the_protected_layers_weigh():
    """As the page says: their share of SDXL's UNet, which is counted without memory for its weights."""
    text = PAGE.read_text(encoding="utf-8")
    words = " ".join(re.findall(r'PROTECT="(?:\$PROTECT )?(.*?)"', text))
    names = set(words.replace(".$i.", ".5.").split())
    names |= {words.split()[-1].replace(".$i.", f".{i}.") for i in (6, 7, 8)}
    with torch.device("meta"):
        layers = find_layers(UNet2DConditionModel(**SDXL))
    assert len(names) == 9 and names <= layers.keys()
    kept = sum(layers[n].weight.numel() for n in names)
    share = kept / sum(m.weight.numel() for m in layers.values())
    assert f"weights are {share:.1%}".replace("%", " %") in text.replace("\n", " ")
    assert f"{(16 - 4) / 8 * kept / 1e6:.0f} MB more" in text


def test_every_command_of_the_page(settings, tmp_path, capsys):
    for arguments in commands(settings):
        code = cli.main(arguments[1:])
        err = capsys.readouterr().err
        assert code == 0, (arguments, err)
    runs = {name: Results.load(tmp_path / "out" / name) for name in ("fp16", "w8a8", "w4a8")}
    assert set(runs["fp16"].figures) == {"fid", "clip"}
    assert set(runs["w8a8"].figures) == {"fid", "clip", "ssim", "psnr"}
    eight, four = (runs[name].figures["psnr"].value for name in ("w8a8", "w4a8"))
    assert eight > 40 and eight > four + 3  # the plans reached the pictures
    assert runs["fp16"].metadata["environment"]["packages"]["torch"]
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| fp16", "| w8a8", "| w4a8"]
    assert "fid - fp16" in table
