"""Quantized models with PyTorch features: copies, layouts, offloading, dynamic shapes, regional compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from torch._dynamo.testing import CompileCounter
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from mixdq_ao import Plan, calibrate, mixdq_config, quantize_
from mixdq_ao.layers import find_layers
from mixdq_ao.models.profiling import named_layers
from mixdq_ao.quantize.tensor import MixDQTensor, is_quantized

from ..conftest import text_rows, unet_inputs


def output(model, seed=7, **changed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**{**unet_inputs(), **changed})[0]


@pytest.fixture
def model(quantized):
    """The small UNet with 8-, 4- and 2-bit weights, BOS rows, a split shortcut."""
    return copy.deepcopy(quantized)


def test_a_deep_copy_is_independent(model):
    expected = output(model)
    other = copy.deepcopy(model)
    assert torch.equal(output(other), expected)
    with torch.no_grad():
        other.conv_out.weight.qdata.zero_() if is_quantized(other.conv_out.weight) else other.conv_out.weight.zero_()
    assert not torch.equal(output(other), expected)
    assert torch.equal(output(model), expected)


def test_saved_and_moved_in_inference_mode(model, tmp_path):
    expected = output(model)
    with torch.inference_mode():
        assert torch.equal(output(model.to("cpu").to(torch.float32)), expected)
        model.save_pretrained(tmp_path)
    assert torch.equal(output(model), expected)
    assert torch.equal(output(UNet2DConditionModel.from_pretrained(tmp_path)), expected)


def test_channels_last(model):
    expected = output(model)
    model.to(memory_format=torch.channels_last)
    torch.manual_seed(7)
    inputs = unet_inputs()
    inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert (model(**inputs)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_reading_a_pickled_state_dict_is_refused_by_name(model, tmp_path):
    """torch refuses to unpickle tensor subclasses, which is code execution. Our file formats contain no pickle."""
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with pytest.raises(Exception, match="MixDQTensor|Weights only"):
        torch.load(tmp_path / "state.pt", weights_only=True)


def test_model_offload(model):
    """The hook of enable_model_cpu_offload: the whole model moves in and out."""
    expected = output(model)
    model, hook = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert torch.equal(output(model), expected)
    hook.offload()
    assert torch.equal(output(model), expected)


def test_sequential_offload(model):
    """The hooks of enable_sequential_cpu_offload: weights are on the meta device but for the moment of their use."""
    expected = output(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    weights = [m.weight for m in find_layers(model).values()]
    assert all(w.is_meta for w in weights) and any(is_quantized(w) for w in weights)
    for _ in range(2):
        assert torch.equal(output(model), expected)
    assert all(m.weight.is_meta for m in find_layers(model).values())


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(model, kind):
    expected = output(model)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, **blocks
    )
    for _ in range(2):
        assert torch.equal(output(model), expected)
    assert any(is_quantized(m.weight) for m in find_layers(model).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stream", [False, True])
def test_group_offload_to_a_gpu(model, stream):
    expected = output(copy.deepcopy(model).to("cuda"), **_moved(unet_inputs()))
    apply_group_offloading(
        model, torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level", use_stream=stream
    )
    for _ in range(2):
        assert torch.equal(output(model, **_moved(unet_inputs())), expected)


def _moved(inputs):
    def move(v):
        return v.cuda() if isinstance(v, torch.Tensor) else v

    torch.manual_seed(7)
    fresh = unet_inputs()
    return {k: {n: move(t) for n, t in v.items()} if isinstance(v, dict) else move(v) for k, v in fresh.items()}


@pytest.fixture(scope="module")
def uniform():
    """A UNet of one block with two equal transformer blocks, W8A8."""
    torch.manual_seed(1)
    model = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
        transformer_layers_per_block=3, attention_head_dim=2, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
    ).eval()  # fmt: skip
    calibration = calibrate(model, run=lambda: output(model))
    quantize_(model, mixdq_config(Plan.uniform(model, 8, 8).with_calibration(calibration)))
    return model


def test_blocks_are_compiled_once_for_all(uniform):
    """compile_repeated_blocks: one graph serves the three equal transformer blocks. Guards, whatever the backend."""
    torch._dynamo.reset()
    model = copy.deepcopy(uniform)
    counter = CompileCounter()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert torch.equal(output(model), output(uniform))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_weights_change_places_in_a_model_compiled_without_guards_on_its_layers(uniform):
    """As in docs/howto/speed.md: new values of inputs of the same kind are used, as they are with guards."""
    torch._dynamo.reset()
    model, counter = copy.deepcopy(uniform), CompileCounter()
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
    compiled = torch.compile(model, backend=counter, fullgraph=True, options=options)
    assert torch.equal(output(compiled), output(uniform))
    other = copy.deepcopy(uniform)
    for name, module in other.named_modules():
        if isinstance(held := getattr(module, "weight", None), MixDQTensor):
            module.weight = Parameter(held.with_tensors(qdata=held.qdata.flip(0)), requires_grad=False)
            model.get_submodule(name).weight = module.weight
    assert torch.equal(output(compiled), output(other)) and not torch.equal(output(other), output(uniform))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_two_resolutions_and_two_batch_sizes_one_more_compilation(uniform):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = torch.compile(uniform, backend=counter, fullgraph=True, dynamic=True)
    for batch, size in ((2, 8), (3, 8), (2, 16), (4, 12)):
        torch.manual_seed(3)
        inputs = {**unet_inputs(batch), "sample": torch.randn(batch, 4, size, size)}
        inputs["encoder_hidden_states"] = text_rows(batch)
        with torch.no_grad():
            assert torch.equal(model(**inputs)[0], uniform(**inputs)[0])
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_the_profiler_says_which_layer(uniform):
    with named_layers(uniform), profile(activities=[ProfilerActivity.CPU]) as record:
        expected = output(uniform)
    names = {event.key for event in record.key_averages()}
    layers = {n: m.weight.describe() for n, m in find_layers(uniform).items() if is_quantized(m.weight)}
    assert layers and {f"{n} ({what})" for n, what in layers.items()} <= names
    assert torch.equal(output(uniform), expected)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        output(uniform)
    assert not any("(W8A8)" in event.key for event in record.key_averages())
