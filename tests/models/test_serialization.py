"""Saving and loading quantized models: bit-exact, or one clear error."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torchao.core.config import config_from_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mixdq_ao import (
    CheckpointError,
    LayerPlan,
    Plan,
    PlanError,
    load_quantized,
    mixdq_config,
    quantize_,
    save_quantized,
)
from mixdq_ao.layers import find_layers
from mixdq_ao.models.checkpoint import Checkpoint
from mixdq_ao.models.exports import export_modelopt, export_torchao
from mixdq_ao.models.plan_of import plan_of, same_layer
from mixdq_ao.quantize.tensor import MixDQTensor, SplitMixDQTensor

from ..conftest import unet_inputs
from .memory import peak_allocated, plain, unmapped
from .same import assert_same

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("kind, shard", [("quantized", 10**9), ("quantized_bf16", 5000)])
def test_every_bit_comes_back(request, tmp_path, plan, kind, shard):
    model = request.getfixturevalue(kind)
    save_quantized(model, tmp_path / "m", plan=plan, max_shard_size=shard)
    files = sorted(p.name for p in (tmp_path / "m").iterdir())
    loaded = load_quantized(tmp_path / "m")
    assert type(loaded) is type(model) and not loaded.training
    assert_same(model, loaded)
    assert (INDEX in files) == (len(files) > 2) == (shard == 5000)
    inputs = unet_inputs()
    inputs = {k: v.to(model.dtype) if k in ("sample", "encoder_hidden_states") else v for k, v in inputs.items()}
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], loaded(**inputs)[0])
    kinds = {type(m.weight) for m in find_layers(loaded).values()}
    assert kinds == {MixDQTensor, SplitMixDQTensor, nn.Parameter}


def test_the_plan_comes_back(tmp_path, quantized, plan):
    save_quantized(quantized, tmp_path / "given", plan=plan)
    assert load_quantized(tmp_path / "given").hf_quantizer.quantization_config.plan == plan
    save_quantized(quantized, tmp_path / "read")
    read = load_quantized(tmp_path / "read").hf_quantizer.quantization_config.plan
    assert read.bos_embedding == plan.bos_embedding
    for name, layer in read.layers.items():
        assert same_layer(layer, plan.layers[name]) and layer.symmetric == plan.layers[name].symmetric, name
        if layer.act_range is not None:  # the calibrated range, moved by less than a step to put 0 on a code
            low, high = plan.layers[name].act_range
            step = (max(high, 0) - min(low, 0)) / (2**layer.act_bits - 1)
            assert abs(layer.act_range[0] - min(low, 0)) <= step and abs(layer.act_range[1] - max(high, 0)) <= step


def test_a_plan_that_is_not_the_models_is_not_written(tmp_path, quantized, plan):
    """Where the given plan and the tensors differ, the tensors decide."""
    wrong = {n: LayerPlan(weight_bits=2) for n in plan.layers}
    save_quantized(quantized, tmp_path / "m", plan=Plan(wrong))
    found = load_quantized(tmp_path / "m").hf_quantizer.quantization_config.plan
    assert found.layers["conv_out"] == plan_of(quantized).layers["conv_out"]


def test_bos_embeddings_are_one_tensor_again(tmp_path, quantized):
    save_quantized(quantized, tmp_path / "m")
    weights = [m.weight for m in find_layers(load_quantized(tmp_path / "m")).values()]
    embeddings = [w.bos_embedding for w in weights if getattr(w, "bos_embedding", None) is not None]
    assert len(embeddings) > 1 and len({e.data_ptr() for e in embeddings}) == 1


def test_the_same_model_makes_the_same_files(tmp_path, quantized):
    for name in "ab":
        save_quantized(quantized, tmp_path / name)
    save_quantized(load_quantized(tmp_path / "a"), tmp_path / "c")
    for file in ("config.json", WEIGHTS):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b and (a == c or file == "config.json")


def test_loading_maps_the_files_and_allocates_almost_nothing(tmp_path, quantized):
    save_quantized(quantized, tmp_path / "m")
    loaded, peak = peak_allocated(lambda: load_quantized(tmp_path / "m"))
    peak -= (tmp_path / "m" / WEIGHTS).stat().st_size  # the mapping counts with the file's size
    held = [t for value in loaded.state_dict().values() for t in plain(value)]
    size = sum(t.numel() * t.element_size() for t in held)
    # What equal weights share may be a tensor that was in memory already: activation parameters, the BOS embedding.
    assert sum(t.numel() * t.element_size() for t in unmapped(held)) < size / 20
    full = sum(4 * p.numel() for p in loaded.parameters())
    assert len(held) > 300 and peak < full / 4


def test_a_loaded_model_can_be_changed_without_changing_the_file(tmp_path, tiny):
    save_quantized(tiny, tmp_path / "m")
    before = (tmp_path / "m" / WEIGHTS).read_bytes()
    loaded = load_quantized(tmp_path / "m")
    with torch.no_grad():
        loaded.conv_in.bias.fill_(7)
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == before
    save_quantized(loaded, tmp_path / "m")  # over the files it is mapped from
    assert_same(loaded, load_quantized(tmp_path / "m"))
    assert copy.deepcopy(loaded).to(torch.bfloat16).conv_out.weight.dtype == torch.bfloat16


def test_other_tensors_of_torchao_are_saved_too(tmp_path, unet, plan):
    overrides = {
        "re:.*ff\\.net\\.0\\.proj": Int8WeightOnlyConfig(),
        "re:.*ff\\.net\\.2": Float8WeightOnlyConfig(),
        "time_embedding.linear_1": Int8DynamicActivationInt8WeightConfig(),
    }
    quantize_(unet, mixdq_config(plan, overrides=overrides))
    save_quantized(unet, tmp_path / "m", plan=plan)
    loaded = load_quantized(tmp_path / "m")
    assert_same(unet, loaded)
    inputs = unet_inputs()
    with torch.no_grad():
        assert torch.equal(unet(**inputs)[0], loaded(**inputs)[0])


def test_torchao_reads_and_writes_our_tensors(tmp_path, tiny):
    """torchao's own helpers, on our tensors and on our files (split weights come as their halves)."""
    state = {n: t for n, t in tiny.state_dict().items() if not isinstance(t, SplitMixDQTensor)}
    back, rest = unflatten_tensor_state_dict(*flatten_tensor_state_dict(state))
    assert not rest and type(back["conv_in.weight"]) is MixDQTensor
    assert torch.equal(back["conv_in.weight"].qdata, tiny.conv_in.weight.qdata)
    save_quantized(tiny, tmp_path / "m")
    from safetensors import safe_open

    with safe_open(tmp_path / "m" / WEIGHTS, "pt") as file:
        back, rest = unflatten_tensor_state_dict(load_file(tmp_path / "m" / WEIGHTS), file.metadata())
    halves = [n for n in back if n.endswith((".first", ".second"))]
    assert not rest and len(halves) == 2 and len(back) == len(tiny.state_dict()) + 1
    assert torch.equal(back["conv_in.weight"].scale, tiny.conv_in.weight.scale)


def text_models():
    clip = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return [CLIPTextModel(clip), T5EncoderModel(t5)]


def test_text_encoders_are_saved_too_tied_weights_once(tmp_path):
    for model in text_models():
        quantize_(model.eval(), mixdq_config(Plan.uniform(model, 8, 16)))
        save_quantized(model, tmp_path / type(model).__name__)
        loaded = load_quantized(tmp_path / type(model).__name__)
        assert type(loaded) is type(model)
        assert_same(model, loaded)
        ids = torch.tensor([[1, 5, 9, 2]])
        with torch.no_grad():
            assert torch.equal(model(ids).last_hidden_state, loaded(ids).last_hidden_state)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    stored = load_file(tmp_path / "T5EncoderModel" / "model.safetensors")
    assert [k for k in stored if "shared" in k or "embed_tokens" in k] == ["shared.weight"]


# What cannot be saved


def test_what_could_not_be_loaded_is_not_saved(tmp_path, unet, plan, quantized):
    with pytest.raises(CheckpointError, match="no quantized layer"):
        save_quantized(unet, tmp_path / "m")
    with pytest.raises(CheckpointError, match="neither a diffusers nor a transformers model"):
        save_quantized(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m")
    quantize_(unet, mixdq_config(plan, mode="fake"))
    with pytest.raises(CheckpointError, match="fake mode"):
        save_quantized(unet, tmp_path / "m")
    changed = copy.deepcopy(quantized)
    changed.conv_in = nn.Sequential(changed.conv_in)
    with pytest.raises(CheckpointError, match="'conv_in.0.weight', which UNet2DConditionModel does not have"):
        save_quantized(changed, tmp_path / "m")
    with pytest.raises(CheckpointError, match="meta device"):
        save_quantized(copy.deepcopy(quantized).to("meta"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_models_are_not_overwritten(tmp_path, unet, quantized):
    unet.save_pretrained(tmp_path / "full")
    before = {p.name: p.read_bytes() for p in (tmp_path / "full").iterdir()}
    with pytest.raises(CheckpointError, match="holds another model"):
        save_quantized(quantized, tmp_path / "full")
    assert {p.name: p.read_bytes() for p in (tmp_path / "full").iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save_quantized(quantized, tmp_path / "file")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for function in (lambda: save_quantized(quantized, tmp_path / "pipe"), lambda: load_quantized(tmp_path / "pipe")):
        with pytest.raises(CheckpointError, match="whole pipeline"):
            function()


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize("crash", range(12))
def test_a_crash_while_saving_leaves_the_old_model_or_none(tmp_path, monkeypatch, tiny, crash):
    """Killed at the n-th file operation: loading gives the old model, the whole new one, or an error."""
    new = copy.deepcopy(tiny)
    with torch.no_grad():
        new.conv_in.bias.fill_(7)
    save_quantized(tiny, tmp_path / "m", max_shard_size=1500)
    shards = len(list((tmp_path / "m").glob("*.safetensors")))
    assert 2 <= shards <= 4
    calls = 0

    def killing(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            if calls == crash:
                raise Killed
            calls += 1
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "replace", killing(os.replace))
    monkeypatch.setattr(Path, "unlink", killing(Path.unlink))
    monkeypatch.setattr("tempfile.TemporaryDirectory.cleanup", lambda self: None)
    with pytest.raises(Killed):
        save_quantized(new, tmp_path / "m", max_shard_size=1500)
    monkeypatch.undo()
    if crash < shards + 3:  # the shards, the index, the config, and the old config's end
        assert_same(tiny, load_quantized(tmp_path / "m"))
    else:
        with pytest.raises(CheckpointError, match="saving it did not end"):
            load_quantized(tmp_path / "m")
    save_quantized(new, tmp_path / "m")
    assert_same(new, load_quantized(tmp_path / "m"))


def test_notes_that_no_file_can_hold_leave_the_old_model(tmp_path, tiny):
    save_quantized(tiny, tmp_path / "m")
    plan = plan_of(tiny)
    with pytest.raises(PlanError, match=r"metadata\['figures'\]\[1\] is a Tensor, expected what JSON can hold"):
        save_quantized(tiny, tmp_path / "m", plan=replace(plan, metadata={"figures": [1, torch.ones(1)]}))
    assert_same(tiny, load_quantized(tmp_path / "m"))
    save_quantized(tiny, tmp_path / "m", plan=replace(plan, metadata={"error": float("nan"), "psnr": float("inf")}))
    loaded = load_quantized(tmp_path / "m").config.quantization_config.plan
    assert loaded.metadata == {"error": None, "psnr": None}


def test_a_full_disk_is_one_error_and_leaves_the_old_model(tmp_path, monkeypatch, tiny):
    save_quantized(tiny, tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_quantized(tiny, tmp_path / "m")
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before


# What cannot be loaded


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "tiny"
    save_quantized(tiny, directory)
    return directory


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "damaged")


def replaced(path: Path, data: bytes) -> None:
    """Replaces a file by a new one: models that map the old file keep it."""
    path.unlink()
    path.write_bytes(data)


def error_of(directory: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_quantized(directory)
    text = str(caught.value)
    assert str(directory) in text and "\n" not in text, text
    for word in words:
        assert word in text, text
    return text


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_is_an_error(damaged, saved, share):
    whole = (saved / WEIGHTS).read_bytes()
    replaced(damaged / WEIGHTS, whole[: int(share * len(whole))])
    error_of(damaged, WEIGHTS)


@FUZZ
@given(bit=st.integers(0, 10**9))
def test_a_flipped_bit_in_a_header_is_an_error_or_harmless(damaged, saved, tiny, bit):
    data = bytearray((saved / WEIGHTS).read_bytes())
    bit %= 8 * (8 + int.from_bytes(data[:8], "little"))
    data[bit // 8] ^= 1 << bit % 8
    replaced(damaged / WEIGHTS, bytes(data))
    try:
        loaded = load_quantized(damaged)
    except CheckpointError as e:
        assert str(damaged) in str(e)
    else:
        assert_same(tiny, loaded)


@FUZZ
@given(bit=st.integers(0, 10**9))
def test_a_flipped_bit_in_the_config_is_an_error_or_leaves_the_tensors_right(damaged, saved, tiny, bit):
    data = bytearray((saved / "config.json").read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    replaced(damaged / "config.json", bytes(data))
    try:
        loaded = load_quantized(damaged)
    except CheckpointError as e:
        assert str(damaged) in str(e)
    else:
        assert_same(tiny, loaded)


def rewritten(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    replaced(path, len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_newer_files_say_so(damaged):
    rewritten(damaged / "config.json", lambda d: d["quantization_config"].update(version=3))
    error_of(damaged, "config.json", "version is 3", "upgrade mixdq-ao")


def test_a_newer_weight_file_says_so(damaged):
    newer = json.dumps({"format": "mixdq-checkpoint", "version": 3, "split": []})
    rewrite_header(damaged / WEIGHTS, lambda h: h["__metadata__"].update(mixdq=newer))
    error_of(damaged, WEIGHTS, "version is 3", "upgrade mixdq-ao")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.pop("bits"), "attributes"),
        (lambda d: d.update(bits=8), "tensors"),
        (lambda d: d.update(bits=True), "bits"),
        (lambda d: d.update(length=5), "qdata"),
        (lambda d: d.update(act_levels=254), "act_levels"),
        (lambda d: d.update(act_levels=None), "tensors"),
        (lambda d: d.update(dtype={"_type": "torch.dtype", "_data": "int8"}), "dtype"),
        (lambda d: d.update(dtype={"_type": "torch.dtype", "_data": "load"}), "dtype"),
    ],
)
def test_attributes_that_do_not_fit_their_tensors_are_errors(damaged, change, words):
    def edit(header):
        record = json.loads(header["__metadata__"]["conv_in.weight"])
        change(record["_data"])
        header["__metadata__"]["conv_in.weight"] = json.dumps(record)

    rewrite_header(damaged / WEIGHTS, edit)
    error_of(damaged, f"'conv_in.weight' is damaged: {words}")


@pytest.mark.parametrize("dtype", ["float16", ["float16"], {"_data": "load"}, {}])
def test_a_type_that_is_none_is_an_error(damaged, dtype):
    """Asked for alone, as diffusers does before it reads the weights."""

    def edit(header):
        record = json.loads(header["__metadata__"]["conv_in.weight"])
        record["_data"]["dtype"] = dtype
        header["__metadata__"]["conv_in.weight"] = json.dumps(record)

    rewrite_header(damaged / WEIGHTS, edit)
    checkpoint = Checkpoint.in_directory(damaged, WEIGHTS.removesuffix(".safetensors"))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: 'conv_in.weight' is damaged: dtype is "):
        checkpoint.dtype("conv_in.weight")
    assert checkpoint.dtype("no.weight") is None and checkpoint.dtype("conv_out.weight") is torch.float32


def test_only_known_classes_are_made(damaged):
    record = json.dumps({"_type": "PosixPath", "_data": {}, "_tensor_data_names": []})
    rewrite_header(damaged / WEIGHTS, lambda h: h["__metadata__"].update({"conv_in.weight": record}))
    error_of(damaged, WEIGHTS, "'PosixPath'")
    rewritten(damaged / "config.json", lambda d: d.update(_class_name="DDIMScheduler"))
    replaced(damaged / WEIGHTS, b"")
    error_of(damaged, "config.json", "'DDIMScheduler'")


def test_a_plan_of_another_save_is_an_error(damaged):
    def edit(document):
        document["quantization_config"]["plan"]["layers"]["conv_in"]["weight_bits"] = 2

    rewritten(damaged / "config.json", edit)
    error_of(damaged, "'conv_in'", "different saves")


def test_a_config_of_another_model_is_an_error(damaged):
    rewritten(damaged / "config.json", lambda d: d.update(in_channels=3))
    error_of(damaged, "'conv_in.weight' has shape [4, 2, 3, 3]", "expects [4, 3, 3, 3]")
    rewritten(damaged / "config.json", lambda d: d.update(in_channels="three"))
    error_of(damaged, "config.json", "cannot be built")


def test_foreign_directories_are_errors(tmp_path, unet):
    error_of(tmp_path, "no config.json")
    unet.save_pretrained(tmp_path / "full")
    error_of(tmp_path / "full", "is not of a model quantized by mixdq_ao")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    error_of(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("[1]")
    error_of(tmp_path, "config.json", "list")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "no whole safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"PK\x03\x04 a pickle in a zip file, as torch.save writes", "no whole safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "damaged header"),
        ((2).to_bytes(8, "little") + b"{}", "holds no model quantized by mixdq_ao"),
        (b"\xff" * 64, "no whole safetensors file"),
    ],
)
def test_files_that_are_something_else_are_errors(damaged, data, words):
    replaced(damaged / WEIGHTS, data)
    error_of(damaged, WEIGHTS, words)


def test_missing_and_mixed_shards_are_errors(tmp_path, tiny):
    save_quantized(tiny, tmp_path / "m", max_shard_size=1500)
    shards = sorted((tmp_path / "m").glob("*-of-*"))
    shutil.copy(shards[0], tmp_path / "kept")
    shards[0].unlink()
    error_of(tmp_path / "m", shards[0].name, "missing")
    shutil.copy(shards[1], shards[0])
    error_of(tmp_path / "m", "repeats")
    shutil.copy(tmp_path / "kept", shards[0])
    for places, words in (({}, "weight_map"), ({"a": "../x.safetensors"}, "names the file '../x.safetensors'")):
        replaced(tmp_path / "m" / INDEX, json.dumps({"weight_map": places}).encode())
        error_of(tmp_path / "m", INDEX, words)
    first = {k: shards[0].name for k in load_file(shards[0])}
    replaced(tmp_path / "m" / INDEX, json.dumps({"weight_map": first}).encode())
    error_of(tmp_path / "m")
    save_quantized(tiny, tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", WEIGHTS]
    (tmp_path / "m" / INDEX).write_text("{}")
    error_of(tmp_path / "m", "two saves")


# For other tools


def test_exported_to_torchao(tmp_path, unet):
    layers = find_layers(unet)
    bits = [(8, 8), (8, 16), (4, 8), (4, 16), (2, 8), (2, 16)]
    plan = {n: LayerPlan(weight_bits=bits[i % 6][0], act_bits=bits[i % 6][1]) for i, n in enumerate(layers)}
    left = export_torchao(Plan(plan), tmp_path / "ao.json", unet)
    assert left == [n for n, m in layers.items() if isinstance(m, nn.Conv2d)]
    config = config_from_dict(json.loads((tmp_path / "ao.json").read_text()))
    assert isinstance(config.fqn_to_config, OrderedDict | dict)
    torchao_quantize_(unet, config, filter_fn=None)
    found = {n: type(m.weight).__name__ for n, m in find_layers(unet).items()}
    for name, layer in plan.items():
        eight = "Int8Tensor" if layer.weight_bits == 8 else "IntxUnpackedToInt8Tensor"
        assert found[name] == ("Parameter" if name in left else eight), name
    with pytest.raises(ValueError, match="W8A4 has no torchao config"):
        export_torchao(Plan({"time_embedding.linear_1": LayerPlan(weight_bits=8, act_bits=4)}), tmp_path / "x", unet)
    assert not (tmp_path / "x").exists()


def test_exported_to_modelopt(tmp_path, plan):
    export_modelopt(plan, tmp_path / "mo.json")
    found = json.loads((tmp_path / "mo.json").read_text())["quantization"]
    assert found["quant_algo"] == "MIXED_PRECISION" and found["exclude_modules"] == ["conv_in"]
    layers = found["quantized_layers"]
    assert set(layers) == {n for n, v in plan.layers.items() if v.quantized}
    for name, layer in layers.items():
        assert (layer["weight_bits"], layer["act_bits"]) == (plan.layers[name].weight_bits, plan.layers[name].act_bits)
    assert {v["quant_algo"] for v in layers.values()} >= {"W8A8_SQ_PER_CHANNEL", "W4A8_QSERVE_PER_CHANNEL", "W2A8"}
