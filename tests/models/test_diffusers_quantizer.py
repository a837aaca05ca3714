"""Loading and saving quantized models by diffusers: the same bits as by ours."""

from __future__ import annotations

import errno
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors import SafetensorError
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

from mixdq_ao import (
    CalibrationError,
    CheckpointError,
    LayerPlan,
    Moments,
    Plan,
    PlanError,
    QuantizationError,
    Sampling,
    TemporalPlan,
    input_moments,
    load_quantized,
    mixdq_config,
    prepare,
    quantize_,
    save_quantized,
)
from mixdq_ao.app.cli import main
from mixdq_ao.layers import find_layers
from mixdq_ao.models import MixDQConfig, attach_quantizer, save_pipeline
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.quantize.tensor import is_quantized

from ..conftest import unet_inputs
from .memory import model_bytes, peak_allocated
from .same import assert_same

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def full(_unet, tmp_path_factory) -> Path:
    """The small UNet in full precision, saved by diffusers."""
    directory = tmp_path_factory.mktemp("full")
    _unet.save_pretrained(directory / "one")
    _unet.save_pretrained(directory / "shards", max_shard_size=60_000)
    assert len(list((directory / "shards").glob("*.safetensors"))) > 3
    return directory


@pytest.mark.parametrize("source", ["one", "shards"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_quantizing_while_loading_is_loading_and_quantizing(full, plan, source, dtype):
    kwargs = {} if dtype is None else {"dtype": dtype}
    streamed = UNet2DConditionModel.from_pretrained(full / source, quantization_config=MixDQConfig(plan), **kwargs)
    whole = UNet2DConditionModel.from_pretrained(full / source, **kwargs)
    quantize_(whole, mixdq_config(plan))
    assert_same(whole, streamed)
    assert streamed.hf_quantizer.quantization_config.plan == plan


def test_overrides_are_followed_while_loading(full, plan, unet):
    overrides = {
        "re:.*ff\\.net\\.0\\.proj": Int8WeightOnlyConfig(),
        "time_embedding.linear_1.weight": Int8WeightOnlyConfig(),
        "conv_out": None,
    }
    config = MixDQConfig(plan, overrides=overrides)
    streamed = UNet2DConditionModel.from_pretrained(full / "one", quantization_config=config)
    quantize_(unet, mixdq_config(plan, overrides=overrides))
    assert_same(unet, streamed)
    assert not is_quantized(streamed.conv_out.weight)
    assert streamed.hf_quantizer.quantization_config.plan.layers["conv_out"] == LayerPlan()


@pytest.fixture(scope="session")
def compensated(plan, _unet, calibration) -> tuple[Plan, Moments]:
    """A few layers rounded with compensation, and moments of the inputs of two of them and more."""
    names = [n for n, layer in plan.layers.items() if layer.quantized and layer.weight_bits < 8 and not layer.split][:2]
    changed = {n: replace(plan.layers[n], weight_range="output", rounding="compensated") for n in names}
    torch.manual_seed(7)
    moments = input_moments(
        _unet, run=lambda: _unet(**unet_inputs()), calibration=calibration, layers=[*names, "conv_out"]
    )
    return plan.with_layers(changed), moments


@pytest.mark.parametrize("source", ["one", "shards"])
def test_compensated_rounding_while_loading(full, compensated, tmp_path, unet, source):
    """With moments in memory or from a file, the result is that of ``quantize_`` with the same plan."""
    plan, moments = compensated
    moments.save(tmp_path / "moments.safetensors")
    quantize_(unet, mixdq_config(plan, moments=moments))
    for given in (moments, tmp_path / "moments.safetensors"):
        config = MixDQConfig(plan, moments=given)
        streamed = UNet2DConditionModel.from_pretrained(full / source, quantization_config=config)
        assert_same(unet, streamed)
        assert streamed.hf_quantizer.quantization_config.moments is None
        assert streamed.hf_quantizer.quantization_config.plan == plan


def test_a_missing_moment_is_named_before_weights_are_read(full, compensated, tmp_path):
    plan, moments = compensated
    first, second = [n for n, layer in plan.layers.items() if layer.needs_moment]

    def load(**options):
        config = MixDQConfig(plan, **options)
        return UNet2DConditionModel.from_pretrained(full / "one", quantization_config=config)

    with pytest.raises(PlanError, match=rf"layer '{first}' \(and 1 more\).*MixDQConfig\(plan, moments=...\)"):
        load()
    with pytest.raises(PlanError, match=f"layer '{second}'"):
        load(moments={first: moments[first]})
    with pytest.raises(CalibrationError, match="nowhere"):
        load(moments=tmp_path / "nowhere")
    model = load(overrides={first: None, f"re:{second}": None})
    assert not is_quantized(model.get_submodule(first).weight)


def test_a_plan_in_a_file(full, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    model = UNet2DConditionModel.from_pretrained(full / "one", quantization_config=MixDQConfig(tmp_path / "plan.json"))
    assert is_quantized(model.conv_out.weight)


@pytest.mark.parametrize("kind", ["quantized", "quantized_bf16"])
def test_saving_and_loading_by_diffusers(request, tmp_path, kind):
    """Shards so small that one weight's tensors are in several. Without a dtype argument no dtype changes."""
    model = request.getfixturevalue(kind)
    attach_quantizer(model)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=8000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 5
    by_diffusers = UNet2DConditionModel.from_pretrained(tmp_path / "theirs")
    assert_same(model, by_diffusers)
    assert_same(model, load_quantized(tmp_path / "theirs"))
    save_quantized(model, tmp_path / "ours")
    assert_same(model, UNet2DConditionModel.from_pretrained(tmp_path / "ours"))
    by_diffusers.save_pretrained(tmp_path / "again")
    assert_same(model, load_quantized(tmp_path / "again"))
    weights = [m.weight for m in find_layers(by_diffusers).values()]
    embeddings = [w.bos_embedding for w in weights if getattr(w, "bos_embedding", None) is not None]
    assert len({e.data_ptr() for e in embeddings}) == 1


def test_another_type_is_what_to_gives(tmp_path, quantized):
    save_quantized(quantized, tmp_path / "m")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert_same(load_quantized(tmp_path / "m").to(torch.bfloat16), loaded)


def test_dequantized_is_a_plain_model_again(tmp_path, quantized):
    save_quantized(quantized, tmp_path / "m")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "m")
    expected = model.conv_out.weight.dequantize()
    model.dequantize()
    assert type(model.conv_out.weight) is torch.nn.Parameter and torch.equal(model.conv_out.weight, expected)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same(model, UNet2DConditionModel.from_pretrained(tmp_path / "plain"))


def test_pickle_is_refused(tmp_path, quantized):
    attach_quantizer(quantized)
    with pytest.raises(CheckpointError, match="not as pickle"):
        quantized.save_pretrained(tmp_path / "m", safe_serialization=False)


def test_plans_are_checked_before_weights_are_read(full, plan, tmp_path, unet):
    foreign = Plan({"decoder.layer": LayerPlan(weight_bits=4)})
    with pytest.raises(PlanError, match="'decoder.layer' is not a linear or convolution layer"):
        UNet2DConditionModel.from_pretrained(full / "one", quantization_config=MixDQConfig(foreign))
    bare = Plan({"conv_out": LayerPlan(weight_bits=8, act_bits=8)})
    with pytest.raises(PlanError, match="'conv_out'.*no act_range"):
        UNet2DConditionModel.from_pretrained(full / "one", quantization_config=MixDQConfig(bare))
    with pytest.raises(PlanError, match="overrides names 'nowhere'"):
        config = MixDQConfig(plan, overrides={"nowhere": None})
        UNet2DConditionModel.from_pretrained(full / "one", quantization_config=config)
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    unet.save_pretrained(tmp_path / "nan")
    with pytest.raises(QuantizationError, match="'conv_out'.*NaN"):
        UNet2DConditionModel.from_pretrained(tmp_path / "nan", quantization_config=MixDQConfig(plan))


def test_damaged_files_are_errors_for_diffusers_too(tmp_path, quantized):
    save_quantized(quantized, tmp_path / "m", max_shard_size=20_000)
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        UNet2DConditionModel.from_pretrained(tmp_path / "m")
    shard.write_bytes(whole)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    changed = {**config, "quantization_config": {**config["quantization_config"], "version": 3}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="upgrade mixdq-ao"):
        UNet2DConditionModel.from_pretrained(tmp_path / "m")
    plan = {**config["quantization_config"]["plan"], "version": 99}
    changed = {**config, "quantization_config": {**config["quantization_config"], "plan": plan}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="is no mixdq-plan of version 1"):
        UNet2DConditionModel.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "in_channels": 3}))
    with pytest.raises((CheckpointError, ValueError), match="conv_in.weight"):
        UNet2DConditionModel.from_pretrained(tmp_path / "m")


# The bundled pipeline


@pytest.fixture(scope="session")
def bundled_plan(_bundled) -> Plan:
    plan = Plan.uniform(_bundled.pipe.unet, 8, 8).with_calibration(_bundled.calibration)
    return plan.with_layers(
        {n: replace(v, weight_bits=4) for i, (n, v) in enumerate(plan.layers.items()) if i % 4 == 0}
    )


@pytest.fixture(scope="session")
def loaded(bundled_plan) -> DiffusionPipeline:
    """The bundled pipeline, quantized while it is read."""
    from examples.shapes.subject import PIPELINE

    config = PipelineQuantizationConfig(quant_mapping={"unet": MixDQConfig(bundled_plan)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionXLPipeline.from_pretrained(PIPELINE, quantization_config=config, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SAMPLING = Sampling(steps=1)


def test_a_pipeline_is_saved_and_draws_the_same_pictures(tmp_path, loaded, _bundled):
    assert all(is_quantized(m.weight) for m in find_layers(loaded.unet).values())
    pictures = generate_all(loaded, _bundled.prompts[:2], SAMPLING)
    loaded.save_pretrained(tmp_path / "theirs")
    save_pipeline(loaded, tmp_path / "ours")
    for name in ("theirs", "ours"):
        again = DiffusionPipeline.from_pretrained(tmp_path / name)
        again.set_progress_bar_config(disable=True)
        assert_same(loaded.unet, again.unet)
        assert torch.equal(generate_all(again, _bundled.prompts[:2], SAMPLING), pictures)
    sizes = [(tmp_path / n / "unet" / WEIGHTS).stat().st_size for n in ("theirs", "ours")]
    assert max(sizes) < 0.4 * 4 * sum(p.numel() for p in loaded.unet.parameters())
    with pytest.raises(CheckpointError, match="exists"):
        save_pipeline(loaded, tmp_path / "ours")


def test_quantizing_while_loading_never_holds_the_full_model(bundled_plan, tmp_path, _bundled):
    from examples.shapes.subject import PIPELINE

    source = PIPELINE / "unet"

    def load():
        config = MixDQConfig(bundled_plan)
        return UNet2DConditionModel.from_pretrained(source, quantization_config=config, dtype=torch.float16)

    model, peak = peak_allocated(load)
    peak -= (source / WEIGHTS).stat().st_size  # mapped, not allocated
    sixteen = sum(2 * p.numel() for p in model.parameters())
    assert model_bytes(model) < peak < 0.8 * sixteen


def test_the_command_line_saves_and_draws(tmp_path, bundled_plan, capsys):
    from examples.shapes.subject import PIPELINE

    bundled_plan.save(tmp_path / "plan.json")
    out, plan = str(tmp_path / "quantized"), str(tmp_path / "plan.json")
    assert main(["quantize", str(PIPELINE), "--plan", plan, "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saved"] == out
    assert main(["quantize", str(PIPELINE), "--plan", plan, "--out", out]) == 2
    assert "exists" in capsys.readouterr().err
    prompt = ["--prompt", "a large red circle", "--steps", "1"]
    assert main(["generate", out, *prompt, "--out", str(tmp_path / "a")]) == 0
    assert main(["generate", str(PIPELINE), "--plan", plan, *prompt, "--out", str(tmp_path / "b")]) == 0
    (a,), (b,) = list((tmp_path / "a").iterdir()), list((tmp_path / "b").iterdir())
    assert a.read_bytes() == b.read_bytes()


def test_the_command_line_quantizes_weight_by_weight(tmp_path, bundled_plan, loaded, capsys, monkeypatch):
    """Its denoiser is never quantized as a whole; a pipeline saved quantized is refused."""
    from examples.shapes.subject import PIPELINE

    bundled_plan.save(tmp_path / "plan.json")
    options = ["--plan", str(tmp_path / "plan.json"), "--json"]
    monkeypatch.setattr("mixdq_ao.app.quantized.apply_plan", None)
    assert main(["quantize", str(PIPELINE), *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    layers = find_layers(loaded.unet).values()
    assert figures["bytes_before"] == sum(4 * p.numel() for m in layers for p in m.parameters())
    assert figures["bytes_after"] < 0.3 * figures["bytes_before"]
    save_pipeline(loaded, tmp_path / "saved")
    assert main(["quantize", str(tmp_path / "saved"), *options]) == 2
    assert "quantized already" in capsys.readouterr().err
    Plan({"decoder": LayerPlan(weight_bits=4)}).save(tmp_path / "plan.json")
    assert main(["quantize", str(PIPELINE), *options]) == 2
    assert "'decoder' is not a linear or convolution layer" in capsys.readouterr().err


def test_what_an_ip_adapter_set_stays_and_is_not_saved(unet, calibration, tmp_path):
    """An IP-Adapter sets attributes of the config; a saved model with its layers could not be loaded."""
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    quantize_(unet, mixdq_config(Plan.uniform(unet, 8, 8).with_calibration(calibration)))
    assert unet.config.encoder_hid_dim_type == "ip_image_proj" and "quantization_config" in unet.config
    unet.encoder_hid_proj = nn.Module()
    unet.encoder_hid_proj.image_projection_layers = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(CheckpointError, match=r"of an IP-Adapter; call pipe.unload_ip_adapter\(\)"):
        unet.save_pretrained(tmp_path)
    unet.dequantize()
    assert unet.config.encoder_hid_dim_type == "ip_image_proj" and "quantization_config" not in unet.config


@pytest.mark.parametrize("save", [UNet2DConditionModel.save_pretrained, save_quantized])
def test_a_model_prepared_for_a_schedule_is_not_saved(unet, tmp_path, save):
    prepare(unet, TemporalPlan({"8": Plan.uniform(unet, 8, 16)}, ("8",)))
    with pytest.raises(CheckpointError, match="prepared for a precision per step"):
        save(unet, tmp_path)
    with pytest.raises(CheckpointError, match="prepared for a precision per step"):
        save_pipeline(DDPMPipeline(unet, DDPMScheduler()), tmp_path / "pipe")


@pytest.mark.parametrize("place", [".", "link", "dangling", "mounted"])
def test_a_pipeline_is_saved_into_an_empty_folder_as_it_is(tmp_path, monkeypatch, loaded, place):
    """A folder that cannot be replaced by renaming, or the target of a link, existing or not."""
    folder = tmp_path / "folder"
    (folder / "mounted").mkdir(parents=True)
    monkeypatch.chdir(folder / "mounted" if place == "." else folder)
    (folder / "link").symlink_to("mounted")
    (folder / "dangling").symlink_to("new")
    real = os.replace

    def replace(source, target):
        if os.path.realpath(target) == str(folder / "mounted"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    save_pipeline(loaded, place)
    assert_same(loaded.unet, DiffusionPipeline.from_pretrained(place).unet)
    assert not [p for p in folder.rglob(".*")] and (folder / "link").is_symlink() and (folder / "dangling").is_symlink()


def test_a_full_disk_is_one_error_and_leaves_no_pipeline(tmp_path, monkeypatch, loaded):
    def full(directory):
        (directory / "unet").mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(loaded, "save_pretrained", full)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be written: .*No space left"):
            save_pipeline(loaded, tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]
