"""Text projections computed once per prompt: the same pictures, fewer products, never those of another text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mixdq_ao import MixDQError, Plan, mixdq_config, quantize_, reuse_text_projections
from mixdq_ao.layers import find_layers
from tests.conftest import text_rows, unet_inputs


@pytest.fixture
def quantized(unet, calibration):
    quantize_(unet, mixdq_config(Plan.uniform(unet, 4, 8).with_calibration(calibration)))
    return unet


@pytest.fixture
def calls(quantized):
    """Names of the text projections computed, in order."""
    seen: list[str] = []
    for name, layer in find_layers(quantized).items():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


@pytest.fixture
def steps():
    """Three denoising steps of one prompt."""
    inputs = unet_inputs()
    return [inputs | {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(t)} for t in (999, 500, 1)]


@torch.no_grad()
def test_the_same_results_with_one_product_per_prompt(quantized, calls, steps):
    expected = [quantized(**step)[0] for step in steps]
    once = len(calls) // len(steps)
    calls.clear()
    pipe = reuse_text_projections(SimpleNamespace(unet=quantized))
    for step, y in zip(steps, expected, strict=True):
        assert torch.equal(pipe.unet(**step)[0], y)
    assert len(calls) == once == len(set(calls)) > 0


@torch.no_grad()
@pytest.mark.parametrize("change", ["another tensor", "written to", "another batch size", "forgotten"])
def test_another_text_is_projected_anew(quantized, calls, steps, change):
    reused = reuse_text_projections(SimpleNamespace(unet=quantized)).unet
    reused(**steps[0])
    step, before = dict(steps[1]), len(calls)
    if change == "another tensor":
        step["encoder_hidden_states"] = text_rows(2)
    elif change == "written to":
        step["encoder_hidden_states"][:, 1:].mul_(2)
    elif change == "another batch size":
        step = unet_inputs(3)
    else:
        reused.forget()
    y = reused(**step)[0]
    assert len(calls) == 2 * before
    assert torch.equal(y, reused.undo()(**step)[0])


@torch.no_grad()
def test_inference_tensors_are_never_taken_for_known(quantized, calls, steps):
    reused = reuse_text_projections(SimpleNamespace(unet=quantized)).unet
    with torch.inference_mode():
        text = text_rows(2)
        first = reused(**(steps[0] | {"encoder_hidden_states": text}))[0]
        text[:, 1:] *= 2
        second = reused(**(steps[0] | {"encoder_hidden_states": text}))[0]
    assert not torch.equal(first, second)


def test_gradients_are_those_of_the_model(quantized, steps):
    """After a call without gradients, and at every step."""
    text = steps[0]["encoder_hidden_states"].requires_grad_()

    def gradient(unet, step):
        return torch.autograd.grad(unet(**step)[0].square().mean(), text)[0]

    expected = [gradient(quantized, step) for step in steps]
    assert all(g.any() for g in expected)
    reused = reuse_text_projections(SimpleNamespace(unet=quantized)).unet
    with torch.no_grad():
        reused(**steps[0])
    for step, g in zip(steps, expected, strict=True):
        assert (gradient(reused, step) - g).norm() < 1e-5 * g.norm()  # summed in another order


@torch.no_grad()
def test_compiled_once_for_all_prompts(quantized, steps):
    torch._dynamo.reset()
    reused = reuse_text_projections(SimpleNamespace(unet=torch.compile(quantized, backend="aot_eager"))).unet
    reused._project = torch.compile(reused._products, backend="aot_eager", fullgraph=True)
    reused(**steps[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            step = steps[0] | {"encoder_hidden_states": text_rows(2)}
            y = reused(**step)[0]
    assert torch.allclose(y, reused.undo()._orig_mod(**step)[0], atol=1e-5)


def test_names_and_attributes_are_those_of_the_model(quantized):
    names = list(find_layers(quantized))
    pipe = reuse_text_projections(SimpleNamespace(unet=quantized))
    assert pipe.unet.config is quantized.config and pipe.unet.dtype == torch.float32
    assert reuse_text_projections(pipe).unet is pipe.unet
    assert pipe.unet.undo() is quantized and list(find_layers(quantized)) == names


def test_models_whose_text_is_not_handed_on(unet):
    with pytest.raises(MixDQError, match="Linear, expected a UNet2DConditionModel"):
        reuse_text_projections(SimpleNamespace(unet=nn.Linear(2, 2)))
    unet.encoder_hid_proj = nn.Linear(24, 24)
    with pytest.raises(MixDQError, match="encoder_hid_proj"):
        reuse_text_projections(SimpleNamespace(unet=unet))
