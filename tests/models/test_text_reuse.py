"""Text projections computed once per prompt: the same pictures, fewer products, and no stale ones."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DConditionModel
from torch import nn

from mixdq_ao import (
    MixDQError,
    Plan,
    TemporalPlan,
    forget_text_projections,
    fuse_text_projections,
    mixdq_config,
    prepare,
    quantize_,
    reuse_text_projections,
)
from mixdq_ao.compat import uncompiled
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
@pytest.mark.parametrize("change", ["another tensor", "written to", "another batch size", "ended and begun anew"])
def test_another_text_is_projected_anew(quantized, calls, steps, change):
    pipe = reuse_text_projections(SimpleNamespace(unet=quantized))
    pipe.unet(**steps[0])
    step, before = dict(steps[1]), len(calls)
    if change == "another tensor":
        step["encoder_hidden_states"] = text_rows(2)
    elif change == "written to":
        step["encoder_hidden_states"][:, 1:].mul_(2)
    elif change == "another batch size":
        step = unet_inputs(3)
    else:
        reuse_text_projections(forget_text_projections(pipe))
    y = pipe.unet(**step)[0]
    assert len(calls) == 2 * before
    assert torch.equal(y, forget_text_projections(pipe).unet(**step)[0])


@torch.no_grad()
def test_inference_tensors_are_never_taken_for_known(quantized, calls, steps):
    reused = reuse_text_projections(SimpleNamespace(unet=quantized)).unet
    with torch.inference_mode():
        text = text_rows(2)
        first = reused(**(steps[0] | {"encoder_hidden_states": text}))[0]
        text[:, 1:] *= 2
        second = reused(**(steps[0] | {"encoder_hidden_states": text}))[0]
    assert not torch.equal(first, second)


@torch.no_grad()
def test_inference_mode_comes_and_goes(quantized, steps):
    expected = [quantized(**step)[0] for step in steps]
    reused = reuse_text_projections(SimpleNamespace(unet=quantized)).unet
    for step, y, inside in zip(steps, expected, (True, False, True), strict=True):
        text = step["encoder_hidden_states"].clone()
        with torch.inference_mode(inside):
            assert torch.equal(reused(**(step | {"encoder_hidden_states": text}))[0], y)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_a_model_that_was_changed_is_pickled_and_copied(quantized, steps, fused):
    if fused:
        fuse_text_projections(quantized)
    else:
        reuse_text_projections(SimpleNamespace(unet=quantized))
    expected = quantized(**steps[0])[0]
    for other in (pickle.loads(pickle.dumps(quantized)), copy.deepcopy(quantized)):
        assert [type(m) for m in other.modules()] == [type(m) for m in quantized.modules()]
        assert torch.equal(other(**steps[0])[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_looks_at_its_own_text(quantized, steps, compiled):
    """Copies of a compiled model lack its hooks."""
    unet = torch.compile(quantized, backend="eager") if compiled else quantized
    pipe = reuse_text_projections(SimpleNamespace(unet=unet))
    pipe.unet(**steps[0])
    other, later = copy.deepcopy(pipe), steps[0] | {"encoder_hidden_states": text_rows(2) + 1}
    for _ in range(2):
        y, stored = other.unet(**later)[0], uncompiled(other.unet).text_reuse.projections[0].stored
        assert torch.equal(y, pipe.unet(**later)[0])
        reuse_text_projections(other)
    assert stored is not None
    assert uncompiled(other.unet).text_reuse is not quantized.text_reuse


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_known(quantized, steps, monkeypatch):
    pipe = reuse_text_projections(SimpleNamespace(unet=quantized))
    expected = pipe.unet(**steps[0])[0]
    last = quantized.text_reuse.projections[-1]
    monkeypatch.setattr(last, "store", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.unet(**(steps[0] | {"encoder_hidden_states": text_rows(2)}))
    monkeypatch.undo()
    assert torch.equal(pipe.unet(**steps[0])[0], expected)


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
    pipe = reuse_text_projections(SimpleNamespace(unet=torch.compile(quantized, backend="aot_eager")))
    quantized.text_reuse.project = torch.compile(quantized.text_reuse._products, backend="aot_eager", fullgraph=True)
    pipe.unet(**steps[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            step = steps[0] | {"encoder_hidden_states": text_rows(2)}
            y = pipe.unet(**step)[0]
    assert torch.allclose(y, forget_text_projections(pipe).unet._orig_mod(**step)[0], atol=1e-5)


@torch.no_grad()
def test_compiled_afterwards_no_prompt_compiles_anew(quantized, steps):
    torch._dynamo.reset()
    texts = [{"encoder_hidden_states": text_rows(2)} for _ in range(4)]
    expected = quantized(**(steps[0] | texts[-1]))[0]
    pipe = reuse_text_projections(SimpleNamespace(unet=quantized))
    pipe.unet = torch.compile(quantized, backend="eager")
    for text in texts[:2]:
        for step in steps:
            pipe.unet(**(step | text))
    with torch.compiler.set_stance("fail_on_recompile"):
        for text in texts[2:]:
            y = pipe.unet(**(steps[0] | text))[0]
    assert torch.allclose(y, expected, atol=1e-5)


@torch.no_grad()
def test_weights_that_are_elsewhere_until_they_are_needed(quantized, steps):
    """Sequential offload: weights are on the meta device except during the calls of their layers."""
    expected = [quantized(**step)[0] for step in steps]
    accelerate.cpu_offload(quantized, execution_device=torch.device("cpu"))
    pipe = reuse_text_projections(SimpleNamespace(unet=quantized))
    assert all(p.is_meta for n, p in quantized.named_parameters() if "attn2.to_k" in n)
    for step, y in zip(steps, expected, strict=True):
        assert torch.equal(pipe.unet(**step)[0], y)


class Fetched(ModelHook):
    """accelerate's hooks of whole models: weights are moved when the model is called."""

    def init_hook(self, module):
        self.state = copy.deepcopy(module.state_dict())
        return module.to("meta")

    def pre_forward(self, module, *args, **kwargs):
        module.load_state_dict(self.state, assign=True)
        return args, kwargs


@torch.no_grad()
def test_a_model_that_is_elsewhere_until_it_is_called(quantized, steps):
    expected = quantized(**steps[0])[0]
    add_hook_to_module(quantized, Fetched())
    pipe = reuse_text_projections(SimpleNamespace(unet=quantized))
    assert all(p.is_meta for p in quantized.parameters())
    assert torch.equal(pipe.unet(**steps[0])[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 16])
def test_the_model_is_what_it_was_by_name_and_by_file(unet, calibration, steps, tmp_path, bits):
    if bits < 16:
        quantize_(unet, mixdq_config(Plan.uniform(unet, bits, 8).with_calibration(calibration)))
    names, state, modules = list(find_layers(unet)), list(unet.state_dict()), dict(unet.named_modules())
    classes = {name: type(module) for name, module in modules.items()}
    pipe = reuse_text_projections(SimpleNamespace(unet=unet))
    expected = pipe.unet(**steps[0])[0]
    assert reuse_text_projections(pipe).unet is unet and isinstance(pipe.unet, UNet2DConditionModel)
    assert list(find_layers(unet)) == names and list(unet.state_dict()) == state
    unet.save_pretrained(tmp_path)
    assert torch.equal(UNet2DConditionModel.from_pretrained(tmp_path)(**steps[0])[0], expected)
    forget_text_projections(pipe)
    assert {n: type(m) for n, m in unet.named_modules()} == classes and not hasattr(unet, "text_reuse")
    assert (
        dict(unet.named_buffers()).keys() == dict(UNet2DConditionModel.from_pretrained(tmp_path).named_buffers()).keys()
    )
    forget_text_projections(pipe)


def test_models_whose_text_is_not_handed_on(unet):
    with pytest.raises(MixDQError, match="Linear, expected a UNet2DConditionModel"):
        reuse_text_projections(SimpleNamespace(unet=nn.Linear(2, 2)))
    unet.encoder_hid_proj = nn.Linear(24, 24)
    with pytest.raises(MixDQError, match="encoder_hid_proj"):
        reuse_text_projections(SimpleNamespace(unet=unet))


@torch.no_grad()
@pytest.mark.parametrize("first", ["reuse", "prepare"])
def test_a_model_of_several_levels_projects_the_text_at_each(unet, calibration, steps, first):
    levels = {str(bits): Plan.uniform(unet, bits, 8).with_calibration(calibration) for bits in (4, 8)}
    plan = TemporalPlan(levels, ("4", "8", "8"))
    apart = prepare(copy.deepcopy(unet), plan)
    expected = []
    for step, apart.level in zip(steps, plan.steps, strict=True):
        expected.append(apart.model(**step)[0])
    scheduler = SimpleNamespace(timesteps=torch.stack([step["timestep"] for step in steps]), order=1)
    pipe = SimpleNamespace(unet=unet, scheduler=scheduler)
    if first == "reuse":
        reuse_text_projections(pipe)
    runtime = prepare(unet, plan)
    reuse_text_projections(pipe)
    runtime.follow(pipe)
    for _ in range(2):
        for step, y in zip(steps, expected, strict=True):
            assert torch.equal(pipe.unet(**step)[0], y)
