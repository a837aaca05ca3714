"""The examples run as they stand, on the bundled pipeline."""

from __future__ import annotations

import io
import json
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from mixdq_ao import MixDQError

EXAMPLES = Path(__file__).parents[2] / "examples"
PIPELINE = EXAMPLES / "shapes" / "pipeline"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, shapes) -> Path:
    """What examples.finetune stores of the bundled pipeline."""
    from examples import finetune

    folder = tmp_path_factory.mktemp("finetune")
    (folder / "prompts.txt").write_text("\n".join(p.text for p in shapes.prompts(4, seed=1)))
    out = folder / "quantized"
    finetune.main([str(PIPELINE), "--prompts", str(folder / "prompts.txt"), "--out", str(out), "--steps", "1"])
    return out


def test_a_finetune_is_stored_small(quantized):
    stored = sum(f.stat().st_size for f in (quantized / "unet").glob("*.safetensors"))
    original = sum(f.stat().st_size for f in (PIPELINE / "unet").glob("*.safetensors"))
    layers = json.loads((quantized / "unet" / "config.json").read_text())
    assert stored < 0.5 * original and "mixdq" in json.dumps(layers)


def test_few_steps_need_the_first_token_apart(bundled):
    from examples import turbo

    naive = turbo.compare(bundled.pipe, turbo.PROMPTS, [1], bos=False)[1]
    apart = turbo.compare(bundled.pipe, turbo.PROMPTS, [1])[1]
    assert apart > 40 > 30 > naive


def test_pictures_over_http(quantized):
    from examples import serve

    pipe = serve.load(str(quantized))
    with serve.server(pipe, 0) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http.server_port}/"

        def get(query: str) -> Image.Image:
            with urllib.request.urlopen(address + query, timeout=60) as answer:
                assert answer.headers["Content-Type"] == "image/png"
                return Image.open(io.BytesIO(answer.read())).convert("RGB")

        first, again, other = (get(f"?prompt=a+red+circle&steps=1&seed={seed}") for seed in (1, 1, 2))
        assert first.size == (64, 64) and first.tobytes() == again.tobytes() != other.tobytes()
        for query, words in (
            ("", "prompt is missing"),
            ("?prompt=x&steps=0", "expected 1 to 50"),
            ("?prompt=x&seed=y", "'y'"),
            ("?prompt=x&steps=%E2%82%AC", "steps is '.u20ac'"),
        ):
            with pytest.raises(urllib.error.HTTPError, match="400.*" + words):
                get(query)
        for query in ("other?prompt=x&steps=1", "favicon.ico"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(query)
        http.shutdown()


@pytest.fixture
def comfyui(monkeypatch, tmp_path) -> ModuleType:
    """ComfyUI's folder_paths, as far as the nodes use it."""
    module: Any = ModuleType("folder_paths")
    places: dict[str, list[str]] = {}
    module.models_dir = str(tmp_path / "models")
    module.add_model_folder_path = lambda name, path: places.setdefault(name, [path])
    module.get_folder_paths = lambda name: places[name][:]
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    return module


def test_comfyui_nodes(comfyui, quantized):
    from examples import comfyui as nodes

    assert nodes.folders() == {}
    place = Path(comfyui.models_dir, "mixdq")
    place.mkdir(parents=True)
    (place / "no-pipeline").mkdir()
    (place / "shapes-w4").symlink_to(quantized)
    loader, drawer = (kind() for kind in nodes.NODE_CLASS_MAPPINGS.values())
    assert loader.INPUT_TYPES()["required"]["name"] == (["shapes-w4"],)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        (pipe,) = getattr(loader, loader.FUNCTION)(name="shapes-w4", device="cpu")
    assert not any(parameter.is_inference() for parameter in pipe.unet.parameters())
    given = {n: spec[1]["default"] for n, spec in drawer.INPUT_TYPES()["required"].items() if "default" in str(spec)}
    given |= {"pipeline": pipe, "prompt": "a large red circle", "steps": 1, "batch_size": 2}
    with torch.inference_mode():
        (images,) = getattr(drawer, drawer.FUNCTION)(**given)
    assert images.shape == (2, 64, 64, 3) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1 and not torch.equal(images[0], images[1])


def test_comfyui_nodes_import_without_comfyui_and_torch():
    import subprocess

    script = "import sys, examples.comfyui; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=EXAMPLES.parent, check=False).returncode == 0


def test_the_notebook_runs_from_top_to_bottom(monkeypatch, capsys):
    """Every code cell in order, as a kernel would; nothing it holds was computed elsewhere."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(EXAMPLES.parent)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"quickstart.ipynb, {cell['id']}", "exec"), names)
    said = capsys.readouterr().out
    assert "the same pictures: True" in said
    quality = [float(line.split()[1]) for line in said.splitlines() if line.startswith("PSNR")]
    naive, apart, four = quality
    assert naive < 30 < four < apart + 20 and apart > 40


@pytest.mark.parametrize(
    ("name", "arguments", "written"),
    [
        ("lora", ["--prompts", "1"], {"fused.png", "loaded.png"}),
        ("lora", ["--prompts", "1", "--adapter", str(EXAMPLES / "shapes" / "lcm_lora")], {"fused.png", "loaded.png"}),
        (
            "train_lora",
            ["--steps", "20", "--batch", "1"],
            {"before_after.png", "pytorch_lora_weights.safetensors"},
        ),
        ("recover", ["--steps", "1", "--prompts", "8"], {"full.png", "rounded.png", "recovered.png", "unet"}),
        (
            "schedule",
            ["--steps", "3", "--prompts", "1", "--costs", "0.4"],
            {"schedule_0.4.json", "schedule_results.json"},
        ),
    ],
)
def test_programs_with_little_to_do(name, arguments, written, tmp_path, monkeypatch):
    from importlib import import_module

    if "lora" in name:
        pytest.importorskip("peft", reason="LoRA is an extra")
    monkeypatch.setattr(sys, "argv", [f"examples.{name}", "--out", str(tmp_path), *arguments])
    import_module(f"examples.{name}").main()
    assert written <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--batch", "-1"], ["--times", "1000"], ["--pictures", "nowhere"]])
def test_what_cannot_be_trained_is_said_before(wrong, tmp_path, capsys):
    pytest.importorskip("peft", reason="LoRA is an extra")
    from examples import train_lora

    with pytest.raises(SystemExit) as e:
        train_lora.main([*wrong, "--out", str(tmp_path)])
    assert wrong[1] in str(e.value) + capsys.readouterr().err and not list(tmp_path.iterdir())


def test_pictures_and_their_captions_are_read(tmp_path):
    pytest.importorskip("peft", reason="LoRA is an extra")
    from PIL import Image

    from examples.train_lora import read_pictures

    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(MixDQError, match="each with its caption"):
            read_pictures(folder, 64)
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    for name in ("a.png", "b.JPG", "without.png"):
        wide.save(tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n", encoding="utf-8")
    (first, caption), (second, other) = read_pictures(tmp_path, 64)
    assert (caption, other) == ("caption a", "caption b")
    assert first.shape == second.shape == (3, 64, 64)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(MixDQError, match="b.txt: is not UTF-8"):
        read_pictures(tmp_path, 64)
    (tmp_path / "a.png").write_bytes(b"none")
    with pytest.raises(MixDQError, match="a.png: cannot be read as a picture"):
        read_pictures(tmp_path, 64)
    assert torch.equal(first[:, 8:56, 8:56], torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 48, 48))  # the middle


def test_an_lcm_lora_makes_a_quantized_many_step_model_draw_in_few(bundled, shapes):
    """Asked for nothing, the bundled pipeline needs many steps; with its adapter few. Captions stay right: their BOS
    rows go through adapted to_k and to_v."""
    pytest.importorskip("peft", reason="LoRA is an extra")
    from examples import lcm_lora
    from mixdq_ao.search.metrics import psnr

    pipe, asked = bundled.pipe, shapes.prompts(4, seed=5, held_out=True)
    texts = [lcm_lora.NOTHING] * 4 + [prompt.text for prompt in asked]
    many = lcm_lora.draw(pipe, texts[:4], 20)
    lora = str(EXAMPLES / "shapes" / "lcm_lora")
    quantized = lcm_lora.few_step(pipe, lora, texts, steps=2)
    with_it = lcm_lora.draw(quantized, texts, 2)
    without = lcm_lora.draw(pipe, texts[:4], 2)
    assert psnr(with_it[:4], many).mean() > psnr(without, many).mean() + 3
    assert shapes.load_scorer().agreement(with_it[4:], [prompt.spec for prompt in asked]).all == 1
    pipe.load_lora_weights(lora, adapter_name="lcm")
    assert psnr(with_it, lcm_lora.draw(pipe, texts, 2)).mean() > 35


@pytest.mark.parametrize("how", ["rule", pytest.param("probes", marks=pytest.mark.slow)])
def test_flux(how, tmp_path, capsys):
    """Quantized, stored, compiled by blocks; what is stored draws the same."""
    from diffusers import DiffusionPipeline

    from examples import flux
    from mixdq_ao import Sampling
    from mixdq_ao.models.pipelines import generate_all

    arguments = ["--how", how, "--probes", "2", "--steps", "1", "--compile", "eager", "--out", str(tmp_path)]
    flux.main(arguments)
    said = capsys.readouterr().out
    assert float(said.split("PSNR")[1].split()[0]) > 20
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    kinds = {type(p).__name__ for p in pipe.transformer.parameters()}
    assert "MixDQTensor" in kinds
    pictures = generate_all(pipe, flux.PROMPTS, Sampling(steps=1, seed=1, height=32, width=32))
    full = generate_all(flux.small_pipeline(), flux.PROMPTS, Sampling(steps=1, seed=1, height=32, width=32))
    from mixdq_ao.search.metrics import psnr

    assert f"PSNR {psnr(pictures, full).mean():.1f} dB" in said
