"""LoRA over quantized layers, against the full-precision model with the same adapter."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch._dynamo.testing import CompileCounter

from mixdq_ao import (
    CheckpointError,
    LayerPlan,
    Plan,
    PlanError,
    QuantizationError,
    TemporalPlan,
    calibrate,
    mixdq_config,
    prepare,
    quantize_,
    save_quantized,
)
from mixdq_ao.layers import find_layers
from mixdq_ao.models.fused_projections import fuse_projections, unfuse_projections
from mixdq_ao.models.fused_text import fuse_text_projections, unfuse_text_projections
from mixdq_ao.models.lora import MixDQLoraConv2d, MixDQLoraLinear, requantized
from mixdq_ao.models.lora_compiled import unwrapped
from mixdq_ao.models.plan_of import layer_plan_of, same_layer
from mixdq_ao.models.text_reuse import forget_text_projections, reuse_text_projections
from mixdq_ao.quantize.tensor import MixDQTensor, is_quantized

from ..conftest import bos_row, small_unet, unet_inputs
from .same import assert_same

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv2", "conv_shortcut"]


def adapter(rank: int = 4, seed: int = 5) -> dict[str, torch.Tensor]:
    return random_adapter(small_unet(), rank, seed)


def random_adapter(model, rank: int = 4, seed: int = 5) -> dict[str, torch.Tensor]:
    """A state dict as ``pipe.load_lora_weights`` reads it, of random numbers."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config)
    state = get_peft_model_state_dict(model, adapter_name="default")
    return {name: 0.3 * tensor.clone() for name, tensor in state.items()}


def load(model, state, name="one", **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*get_apply_tensor_subclass.*")  # torchao's way of merging
        model.load_lora_adapter({f"unet.{k}": v for k, v in state.items()}, prefix="unet", adapter_name=name, **options)
    return model


@pytest.fixture
def fine(unet, calibration):
    """The small UNet at W8A8 with BOS rows: close enough to full precision to recognise an adapter's effect."""
    quantize_(unet, mixdq_config(Plan.uniform(unet, 8, 8).with_calibration(calibration)))
    return unet


def output(model, seed=7):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**unet_inputs())[0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_an_adapter_does_what_it_does_in_full_precision(unet, calibration, _unet):
    """8-bit weights and 16-bit activations: an adapter cannot push activations out of a calibrated range."""
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    fine = unet
    quantize_(fine, mixdq_config(plan.with_layers({n: replace(v, act_bits=16) for n, v in plan.layers.items()})))
    full = copy.deepcopy(_unet)
    without, error = output(full), relative(output(fine), output(full))
    state = adapter()
    load(full, state), load(fine, state)
    kinds = {type(m).__name__ for m in fine.modules() if isinstance(m, MixDQLoraLinear | MixDQLoraConv2d)}
    assert kinds == {"MixDQLoraLinear", "MixDQLoraConv2d"}
    moved = relative(output(full), without)
    assert moved > 4 * error  # the adapter does something
    assert relative(output(fine), output(full)) < 1.5 * error


def test_bos_rows_of_adapted_projections_are_those_of_full_precision(fine, _unet):
    full = copy.deepcopy(_unet)
    state = adapter()
    load(full, state), load(fine, state)
    layers, exact = dict(fine.named_modules()), dict(full.named_modules())
    x = torch.randn(2, 3, 24)
    x[:, 0] = bos_row()
    names = [n for n in layers if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert names
    for name in names:
        module = exact[name]
        a, b = (getattr(module, k)["one"].weight.double() for k in ("lora_A", "lora_B"))
        weight = module.base_layer.weight.double()
        row = bos_row().double()
        expected = weight @ row + b @ (a @ row)
        budget = 1e-5 * (weight.abs() @ row.abs() + b.abs() @ (a.abs() @ row.abs()))
        naive = layers[name].base_layer.weight.dequantize().double() @ row + b @ (a @ row)
        assert ((naive - expected).abs() > budget).any()  # the rounded weight alone is not good enough
        for fused in (False, True):
            if fused:
                layers[name].merge()
            assert ((layers[name](x)[:, 0].double() - expected).abs() <= budget).all(), (name, fused)


def test_fusing_is_one_rounding_and_unfusing_gives_the_very_weights_back(quantized, plan):
    """All bit widths, symmetric and not, splits, BOS."""
    model = copy.deepcopy(quantized)
    before = copy.deepcopy(model)
    load(model, adapter())
    wrapped = {n: m for n, m in model.named_modules() if isinstance(m, MixDQLoraLinear | MixDQLoraConv2d)}
    held = {n: m.base_layer.weight for n, m in wrapped.items()}
    deltas = {n: m.get_delta_weight("one") for n, m in wrapped.items()}
    unfused = output(model)
    model.fuse_lora()
    for name, module in wrapped.items():
        weight, old = module.base_layer.weight, held[name]
        assert same_layer(layer_plan_of(weight), layer_plan_of(old)) and type(weight.data) is type(old.data)
        halves = (
            [(weight, old)]
            if isinstance(weight, MixDQTensor)
            else [(weight.first, old.first), (weight.second, old.second)]
        )
        start = 0
        for new, base in halves:
            delta = deltas[name][:, start : start + base.shape[1]]
            start += base.shape[1]
            step = new.weight_scale().reshape(-1, *[1] * (delta.dim() - 1))
            assert (new.dequantize() - (base.dequantize() + delta)).abs().le(0.5001 * step + 1e-6).all(), name
            if base.act is not None:
                assert torch.equal(new.act_scale, base.act_scale) and torch.equal(
                    new.act_zero_point, base.act_zero_point
                )
    assert 0 < relative(output(model), unfused) < 0.7  # most of them hold 4 and 2 bits
    model.unfuse_lora()
    for name, module in wrapped.items():
        assert module.base_layer.weight is held[name]
    model.unload_lora()
    assert_same(before, model)


def test_a_model_that_was_moved_while_fused_gets_its_weights_back_as_it_is_now(fine):
    expected = copy.deepcopy(fine)
    for name in ("one", "two"):
        load(fine, adapter(), name=name)
        load(expected, adapter(), name=name)
    fine.fuse_lora(adapter_names=["one"])
    fine.to(torch.bfloat16)
    fine.fuse_lora(adapter_names=["two"])
    fine.unfuse_lora()
    expected.to(torch.bfloat16)
    assert {p.dtype for p in fine.parameters()} == {torch.bfloat16}
    assert_same(expected, fine)


def test_fused_at_8_bits_is_close_to_not_fused(fine):
    load(fine, adapter())
    unfused = output(fine)
    fine.fuse_lora(lora_scale=1.0)
    assert 0 < relative(output(fine), unfused) < 0.05
    fine.unload_lora()  # the weights stay fused
    assert 0 < relative(output(fine), unfused) < 0.05
    assert all(is_quantized(m.weight) for m in find_layers(fine).values())


@pytest.mark.parametrize("then", ["changed", "deleted"])
def test_what_was_fused_stays_as_it_was(fine, then):
    for name, seed in (("a", 5), ("b", 6)):
        load(fine, adapter(seed=seed), name)
    fine.set_adapters(["a", "b"])
    together, apart = copy.deepcopy(fine), fine
    together.fuse_lora()
    apart.fuse_lora(adapter_names=["a"])
    if then == "deleted":
        apart.delete_adapters("a")
    else:
        with torch.no_grad():
            for name, parameter in apart.named_parameters():
                if ".a." in name:
                    parameter.fill_(9.0)
    apart.fuse_lora(adapter_names=["b"])
    assert torch.equal(output(together), output(apart))


def test_two_adapters_fused_one_after_the_other_are_the_two_at_once(fine):
    states = adapter(seed=5), adapter(seed=6)
    for name, state in zip("ab", states, strict=True):
        load(fine, state, name)
    fine.set_adapters(["a", "b"], [0.5, 2.0])
    together, apart = copy.deepcopy(fine), fine
    together.fuse_lora()
    apart.fuse_lora(adapter_names=["a"])
    apart.fuse_lora(adapter_names=["b"])
    assert torch.equal(output(together), output(apart))
    together.set_adapters(["a", "b"], [0.0, 0.0])
    together.unfuse_lora()
    apart.unfuse_lora()
    apart.disable_lora()
    assert torch.equal(output(together), output(apart))


def one_block(down: str = "CrossAttnDownBlock2D") -> UNet2DConditionModel:
    """A UNet that torch.compile traces in seconds."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=24,
        down_block_types=(down,), up_block_types=("UpBlock2D",), mid_block_type=None,
        attention_head_dim=2, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    ).eval()  # fmt: skip


def test_scales_and_hot_swaps_do_not_compile_again():
    """Dynamo's guards decide about recompilation, with any backend."""
    torch._dynamo.reset()
    counter = CompileCounter()
    full = one_block()
    fine = copy.deepcopy(full)
    adapter = partial(random_adapter, full)
    calibration = calibrate(fine, run=lambda: output(fine))
    quantize_(fine, mixdq_config(Plan.uniform(fine, 8, 8).with_calibration(calibration)))
    plain = copy.deepcopy(fine)
    fine.enable_lora_hotswap(target_rank=8)
    load(fine, adapter(rank=4))
    compiled = torch.compile(fine, backend=counter, fullgraph=True)
    first = output(compiled)
    assert counter.frame_count == 1
    for scale in (0.5, 2.0, 0.0):
        fine.set_adapters("one", scale)
        assert torch.equal(output(compiled), output(fine)) and not torch.equal(output(compiled), first)
    fine.set_adapters("one", 1.0)
    assert torch.equal(output(compiled), first)
    other = adapter(rank=8, seed=9)
    load(fine, other, hotswap=True)
    fresh = copy.deepcopy(plain)
    load(fresh, other)
    swapped = output(compiled)
    assert counter.frame_count == 1
    assert relative(swapped, output(fresh)) < 1e-5 and relative(swapped, first) > 1e-3
    torch._dynamo.reset()


def test_what_cannot_be_done_is_said(fine):
    with pytest.raises(QuantizationError, match="use_dora"):
        copy.deepcopy(fine).add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    for start in ("pissa", "pissa_niter_4", "olora"):
        with pytest.raises(QuantizationError, match=f"to_q': init_lora_weights='{start}' changes the weight"):
            copy.deepcopy(fine).add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=start))


def test_a_broken_adapter_is_not_fused(fine):
    state = adapter()
    name = next(n for n in state if "lora_B" in n)
    state[name][0] = torch.nan
    load(fine, state)
    weights = {n: m.weight for n, m in fine.named_modules() if isinstance(getattr(m, "weight", None), MixDQTensor)}
    with pytest.raises(QuantizationError, match="NaN"):
        fine.fuse_lora()
    fine.unfuse_lora()
    for n, m in fine.named_modules():
        assert n not in weights or m.weight is weights[n]


def test_a_plan_with_a_searched_range_is_requantized_so(unet, calibration):
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = LayerPlan(weight_bits=4, weight_range="mse")
    quantize_(unet, mixdq_config(Plan({name: layer})))
    module = unet.get_submodule(name)
    assert module.layer_plan == layer
    zero = torch.zeros(module.weight.shape)
    mse, minmax = (
        requantized(module.weight, zero, layer),
        requantized(module.weight, zero, replace(layer, weight_range="minmax")),
    )
    error = [(w.dequantize() - module.weight.dequantize()).norm() for w in (mse, minmax)]
    assert error[0] <= error[1]


def test_a_text_encoder_takes_adapters_too():
    from .test_whole_pipeline import IDS, tiny_clip

    torch.manual_seed(3)
    encoder = tiny_clip()
    quantize_(encoder, mixdq_config(Plan.uniform(encoder, 8, 16)))
    before = encoder(IDS).last_hidden_state
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    assert not torch.equal(encoder(IDS).last_hidden_state, before)
    encoder.disable_adapters()
    assert torch.equal(encoder(IDS).last_hidden_state, before)


@pytest.fixture(params=["DownBlock2D"])
def drawn_by(request):
    """A pipeline of one small quantized UNet, another such UNet, and adapters for it."""
    full = one_block(request.param)
    calibration = calibrate(full, run=lambda: output(full))
    fine = copy.deepcopy(full)
    quantize_(fine, mixdq_config(Plan.uniform(fine, 8, 8).with_calibration(calibration)))
    pipe = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=fine,
        scheduler=DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip
    torch._dynamo.reset()
    yield SimpleNamespace(pipe=pipe, fine=copy.deepcopy(fine), state=partial(random_adapter, full))
    torch._dynamo.reset()


def prefixed(state):
    return {f"unet.{name}": tensor.clone() for name, tensor in state.items()}  # swapping writes into what was loaded


def test_a_pipeline_finds_the_adapters_of_a_unet_that_was_compiled_before(drawn_by):
    """After pipe.unet = torch.compile(pipe.unet), whose class diffusers' pipelines do not know."""
    pipe, counter = drawn_by.pipe, CompileCounter()
    compiled = pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    plain = output(pipe.unet)
    one = drawn_by.state(seed=5)
    expected = {scale: output(scaled(drawn_by.fine, one, scale)) for scale in (1.0, 0.5)}
    pipe.load_lora_weights(prefixed(one), adapter_name="one")
    assert pipe.unet is compiled and pipe.get_list_adapters() == {"unet": ["one"]}
    assert torch.equal(output(pipe.unet), expected[1.0])
    frames = counter.frame_count
    for scale in (0.5, 1.0):
        pipe.set_adapters("one", scale)
        assert torch.equal(output(pipe.unet), expected[scale])
    pipe.load_lora_weights(prefixed(drawn_by.state(seed=6)), adapter_name="one", hotswap=True)
    assert relative(output(pipe.unet), expected[1.0]) > 1e-3
    assert counter.frame_count == frames == 2
    pipe.load_lora_weights(prefixed(one), adapter_name="one", hotswap=True)
    pipe.fuse_lora(components=["unet"])
    assert pipe.num_fused_loras == 1
    fused = scaled(drawn_by.fine, one, 1.0)
    fused.fuse_lora()
    assert torch.equal(output(pipe.unet), output(fused)) and not torch.equal(output(fused), expected[1.0])
    pipe.unfuse_lora(components=["unet"])
    assert torch.equal(output(pipe.unet), expected[1.0])
    pipe.unload_lora_weights()
    assert pipe.unet is compiled and torch.equal(output(pipe.unet), plain)


def scaled(model, state, scale):
    model = load(copy.deepcopy(model), state)
    model.set_adapters("one", scale)
    return model


def test_a_unet_compiled_in_place_takes_adapters(drawn_by):
    pipe, counter = drawn_by.pipe, CompileCounter()
    pipe.unet.compile(backend=counter, fullgraph=True)
    output(pipe.unet)
    one = drawn_by.state(seed=5)
    pipe.load_lora_weights(prefixed(one), adapter_name="one")
    assert torch.equal(output(pipe.unet), output(scaled(drawn_by.fine, one, 1.0))) and counter.frame_count == 2


def test_hot_swaps_are_asked_for_before_compiling(drawn_by):
    pipe = drawn_by.pipe
    pipe.unet.compile(backend="eager")
    pipe.enable_lora_hotswap(target_rank=8)
    with pytest.raises(ValueError, match="before.* compiling the model"):
        pipe.load_lora_weights(prefixed(drawn_by.state(seed=5)), adapter_name="one")
    assert not any(pipe.get_list_adapters().values())


@pytest.mark.parametrize("drawn_by", ["CrossAttnDownBlock2D"], indirect=True)
def test_where_an_adapter_would_do_nothing_it_is_refused(drawn_by):
    pipe, state = drawn_by.pipe, prefixed(drawn_by.state(seed=5))
    assert fuse_projections(pipe.unet)
    with pytest.raises(QuantizationError, match=r"attn1.*unfuse_projections\(model\) before"):
        pipe.load_lora_weights(state)
    unfuse_projections(pipe.unet)
    reuse_text_projections(pipe)
    with pytest.raises(QuantizationError, match=r"forget_text_projections\(pipe\) before"):
        pipe.load_lora_weights(state)
    with pytest.raises(QuantizationError, match="forget_text_projections"):
        pipe.unet.load_lora_adapter(state, prefix="unet")
    forget_text_projections(pipe)
    assert fuse_text_projections(pipe.unet)
    with pytest.raises(QuantizationError, match=r"unfuse_text_projections\(unet\) before"):
        pipe.load_lora_weights(state)
    unfuse_text_projections(pipe.unet)
    pipe.load_lora_weights(state, adapter_name="one")
    assert pipe.get_list_adapters() == {"unet": ["one"]}


def test_pipelines_without_quantized_models_are_as_diffusers_has_them():
    pipe = SimpleNamespace(_lora_loadable_modules=["unet"], unet=torch.compile(one_block(), backend="eager"))
    held = pipe.unet
    with unwrapped(pipe):
        assert pipe.unet is held


def test_a_model_that_still_has_an_adapter_is_neither_planned_nor_saved(unet, calibration, fine, tmp_path):
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    apart = small_unet()
    load(apart, adapter())
    with pytest.raises(PlanError, match=r"part of an adapter \(peft\); make it permanent"):
        quantize_(apart, mixdq_config(plan))
    load(fine, adapter())
    fine.fuse_lora()
    with pytest.raises(CheckpointError, match=r"has adapters; pipe.unload_lora_weights\(\) before saving"):
        save_quantized(fine, tmp_path / "saved")
    prepared = small_unet()
    prepare(prepared, TemporalPlan({"8": plan}, ("8",)))
    with pytest.raises(QuantizationError, match="prepared for a precision per step, whose layers take no adapters"):
        load(prepared, adapter())
