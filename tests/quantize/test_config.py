"""quantize_ on whole models: real against fake, coverage, overrides, and errors before anything changes."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.transform_module import register_quantize_module_handler

from mixdq_ao import (
    LayerPlan,
    MixDQTensor,
    Plan,
    PlanError,
    QuantizationError,
    fuse_projections,
    mixdq_config,
    quantize_,
)
from mixdq_ao.layers import find_layers
from mixdq_ao.quantize.config import MixDQLayerConfig
from mixdq_ao.quantize.fake import FakeQuantConv2d, FakeQuantLinear
from mixdq_ao.quantize.tensor import SplitMixDQTensor, is_quantized
from mixdq_ao.search.metrics import sqnr

from ..conftest import unet_inputs

FLOAT32 = 110
"""dB of SQNR between layers that differ only by float32's rounding of sums."""


@torch.no_grad()
def worst_layer(unet, other, inputs):
    """The lowest SQNR of ``other``'s layers given the inputs of ``unet``'s. Whole models differ by more: where a sum is
    rounded differently, one code that flips at a tie changes all later codes."""
    known, found = find_layers(other), []
    hooks = [
        m.register_forward_hook(lambda m, args, y, name=name: found.append(sqnr(y, known[name](*args))))
        for name, m in find_layers(unet).items()
    ]
    unet(**inputs)
    for hook in hooks:
        hook.remove()
    assert len(found) >= len(known)
    return min(found)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_real_mode_is_fake_mode(unet, calibration, bits, act_bits):
    plan = Plan.uniform(unet, bits, act_bits).with_calibration(calibration)
    fake, real = copy.deepcopy(unet), copy.deepcopy(unet)
    quantize_(fake, mixdq_config(plan, mode="fake"))
    quantize_(real, mixdq_config(plan))
    inputs = unet_inputs()
    with torch.no_grad():
        y, expected, full = real(**inputs)[0], fake(**inputs)[0], unet(**inputs)[0]
    assert worst_layer(fake, real, inputs) > FLOAT32
    assert sqnr(full, y) > sqnr(full, expected) - 1
    if bits == 8:
        assert sqnr(full, y) > 20


def test_every_planned_layer_is_quantized(unet, calibration):
    plan = Plan.uniform(unet, 4, 8).with_calibration(calibration)
    plan = plan.with_layers({"conv_in": LayerPlan()})
    quantize_(unet, mixdq_config(plan))
    kept = [n for n, m in find_layers(unet).items() if not is_quantized(m.weight)]
    assert kept == ["conv_in"]
    splits = [n for n, m in find_layers(unet).items() if isinstance(m.weight, SplitMixDQTensor)]
    assert splits == [n for n, v in plan.layers.items() if v.split is not None] != []


def test_layers_that_read_the_text_share_one_bos_embedding(unet, calibration):
    quantize_(unet, mixdq_config(Plan.uniform(unet, 4, 8).with_calibration(calibration)))
    weights = [m.weight for n, m in find_layers(unet).items() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert weights and len({w.bos_embedding.data_ptr() for w in weights}) == 1


def test_overrides_combine_with_other_torchao_features(unet, calibration):
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    overrides = {"re:.*ff\\.net\\.0\\.proj": Int8WeightOnlyConfig(), "conv_out": None}
    quantize_(unet, mixdq_config(plan, overrides=overrides))
    layers = find_layers(unet)
    assert not is_quantized(layers["conv_out"].weight)
    other = [m.weight for n, m in layers.items() if n.endswith("ff.net.0.proj")]
    assert other and not any(isinstance(w, MixDQTensor) for w in other)
    with torch.no_grad():
        assert torch.isfinite(unet(**unet_inputs())[0]).all()


def test_an_override_that_matches_nothing(unet, calibration):
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    for overrides, says in (
        ({"conv_inn": None}, "overrides names 'conv_inn'"),
        ({"re:midblock.*": None}, "overrides names 're:midblock.*', which matches no layer"),
        ({"re:(": None}, "overrides names 're:\\(', which is no regular expression"),
        ({"mid_block": Int8WeightOnlyConfig()}, r"overrides names 'mid_block', which holds layers; .*re:mid_block"),
        ({"conv_out": "int8"}, "overrides gives 'conv_out' 'int8', expected a torchao config or None"),
        (
            {"re:conv_.*": MixDQLayerConfig(LayerPlan(weight_bits=8))},
            "overrides gives 're:conv_.*' a MixDQLayerConfig, expected",
        ),
        (
            {"conv_out.weight": MixDQLayerConfig(LayerPlan(weight_bits=8))},
            "overrides gives 'conv_out.weight' a MixDQLayerConfig",
        ),
    ):
        with pytest.raises(PlanError, match=says):
            quantize_(unet, mixdq_config(plan, overrides=overrides))


class Fails(AOBaseConfig):
    """Like a torchao config that requires another shape."""


@register_quantize_module_handler(Fails)
def _fails(module, config):
    raise ValueError("expected 32 rows")


@pytest.mark.parametrize("key", ["conv_out", "re:conv_o.*", "conv_out.weight"])
def test_an_override_that_fails_leaves_the_model_unchanged(unet, calibration, key):
    """Also if the plan would change norms and weights first."""
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(QuantizationError, match="layer 'conv_out': what overrides say of it cannot be done"):
        quantize_(unet, mixdq_config(plan, overrides={key: Fails()}))
    after = unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_compiled_model_is_quantized_as_the_model_it_is(unet, calibration):
    compiled = torch.compile(copy.deepcopy(unet), backend="eager")
    plan = Plan.uniform(compiled, 8, 8).with_calibration(calibration)
    assert plan.layers == Plan.uniform(unet, 8, 8).with_calibration(calibration).layers
    assert plan.summary(compiled) == plan.summary(unet)
    for model in (compiled, unet):
        quantize_(model, mixdq_config(plan))
    inputs = unet_inputs()
    with torch.no_grad():
        assert torch.equal(compiled(**inputs)[0], unet(**inputs)[0])


def test_a_layer_prints_its_precision(unet, calibration):
    quantize_(unet, mixdq_config(Plan.uniform(unet, 4, 8).with_calibration(calibration)))
    again = pickle.loads(pickle.dumps(copy.deepcopy(unet)))
    for model in (unet, again):
        assert str(model.conv_out).endswith(", W4A8)")
        assert "W4A8 BOS)" in str(model)
    unet.conv_out.weight = nn.Parameter(torch.zeros(4, 8, 3, 3))
    assert "W4A8" not in str(unet.conv_out) and "W4A8" in str(again.conv_out)


def test_not_a_number_in_the_last_layer_leaves_the_model_unchanged(unet, calibration):
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 0, 0] = float("nan")
    config = mixdq_config(Plan.uniform(unet, 8, 8).with_calibration(calibration))
    with pytest.raises(QuantizationError, match="'conv_out'.*NaN"):
        quantize_(unet, config)
    assert not any(is_quantized(m.weight) for m in find_layers(unet).values())


def test_missing_ranges(unet):
    with pytest.raises(PlanError, match="no act_range; run calibrate"):
        mixdq_config(Plan.uniform(unet, 8, 8))


def test_quantizing_twice(unet, calibration):
    config = mixdq_config(Plan.uniform(unet, 8, 8).with_calibration(calibration))
    quantize_(unet, config)
    with pytest.raises(QuantizationError, match="quantized already"):
        quantize_(unet, config)


def test_activation_alone_is_for_fake_mode(unet, calibration):
    plan = Plan({"conv_in": LayerPlan(act_bits=8)}).with_calibration(calibration)
    with pytest.raises(PlanError, match="'conv_in'.*mode='fake'"):
        mixdq_config(plan)
    quantize_(unet, mixdq_config(plan, mode="fake"))


def test_unknown_mode(unet):
    with pytest.raises(PlanError, match="mode is 'dry'"):
        mixdq_config(Plan.uniform(unet, 8, 16), mode="dry")  # type: ignore[arg-type]


def test_fake_mode_learns_and_becomes_real(unet, calibration):
    plan = Plan.uniform(unet, 4, 8).with_calibration(calibration)
    quantize_(unet, mixdq_config(plan, mode="fake"))
    inputs = unet_inputs()
    unet(**inputs)[0].square().mean().backward()
    grads = [m.weight.grad for m in find_layers(unet).values()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert sum(g.abs().sum() > 0 for g in grads) > 0.9 * len(grads)
    fake = copy.deepcopy(unet)
    quantize_(unet, mixdq_config(plan))
    assert not any(isinstance(m, FakeQuantLinear) for m in unet.modules())
    assert worst_layer(fake, unet, inputs) > FLOAT32


def test_a_layer_outside_a_unet():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    quantize_(model, mixdq_config(Plan.uniform(model, 4, 16)))
    assert model(torch.randn(2, 6)).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (nn.utils.parametrizations.weight_norm, "layer '1': its weight is computed by a parametrization"),
        (lambda m: prune.identity(m, "weight"), "layer '1': its weight is computed"),
        (lambda m: m.double(), "layer '1': weight is a Parameter of torch.float64, expected plain float32"),
    ],
)
def test_a_weight_that_cannot_be_replaced_is_refused_before_anything_is_changed(change, says):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    change(model[1])
    plan = Plan({"0": LayerPlan(weight_bits=8, act_bits=16), "1": LayerPlan(weight_bits=8, act_bits=16)})
    with pytest.raises((PlanError, QuantizationError), match=says):
        quantize_(model, mixdq_config(plan))
    assert not is_quantized(model[0].weight)


def test_what_is_given_in_the_wrong_place_is_named():
    with pytest.raises(PlanError, match="plan is 'plan.json', expected a Plan"):
        mixdq_config("plan.json")


def test_a_layer_that_cannot_be_quantized_stays_in_fake_mode(unet, calibration):
    plan = Plan.uniform(unet, 4, 8).with_calibration(calibration)
    quantize_(unet, mixdq_config(plan, mode="fake"))
    with torch.no_grad():
        unet.conv_out.weight[0] = torch.nan
    with pytest.raises(QuantizationError, match="weight has 72 NaN"):
        torchao_quantize_(unet, FqnToConfig({"conv_out": MixDQLayerConfig(LayerPlan(weight_bits=8))}), filter_fn=None)
    assert isinstance(unet.conv_out, FakeQuantConv2d)


def test_what_is_no_model_or_no_config_is_named(unet):
    for call in (lambda m: Plan.uniform(m, 8, 16), fuse_projections, lambda m: quantize_(m, mixdq_config(Plan({})))):
        with pytest.raises(QuantizationError, match="model is a SimpleNamespace, expected nn.Module, as pipe.unet"):
            call(SimpleNamespace(unet=unet))
    with pytest.raises(QuantizationError, match=r"config is a Plan, expected .* mixdq_config\(plan\)"):
        quantize_(unet, Plan.uniform(unet, 8, 16))


def test_offloaded_layers_are_named(unet):
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    with pytest.raises(QuantizationError, match="layer 'conv_in' is offloaded.*quantize_ first"):
        quantize_(unet, mixdq_config(Plan.uniform(unet, 8, 16)))


def test_layers_of_adapters_are_named():
    names = ("a.to_q.base_layer", "a.to_q.lora_A.default", "a.to_q.lora_B.default")
    model = nn.Module()
    for name in names:
        parent = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(2, 2))
    for name in names:
        with pytest.raises(PlanError, match=f"layer '{name}' is part of an adapter"):
            quantize_(model, mixdq_config(Plan({name: LayerPlan(weight_bits=8)})))


W8A8 = LayerPlan(weight_bits=8, act_bits=8, act_range=(-4, 4))


class Doubled(nn.Linear):
    """A layer whose own forward calls that of nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Causal(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (2, 0, 2, 0)))


class Standardised(nn.Conv2d):
    """A convolution whose own forward multiplies with a tensor computed from its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - 0.5, self.bias)


@pytest.mark.parametrize("kind", [Doubled, Causal])
def test_layers_of_classes_of_their_own_keep_their_forward_in_fake_mode(kind):
    layer, x = (kind(8, 8), torch.randn(4, 8)) if kind is Doubled else (kind(3, 3, 3), torch.randn(1, 3, 6, 6))
    fake, real, config = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer)), Plan({"0": W8A8})
    full = layer(x)
    quantize_(real, mixdq_config(config))
    for _ in range(2):  # the second time from fake mode
        quantize_(fake, mixdq_config(config, mode="fake"))
        assert isinstance(fake[0], kind) and isinstance(fake[0], FakeQuantLinear | FakeQuantConv2d)
        torch.testing.assert_close(fake(x), real(x), rtol=1e-4, atol=1e-5)
        assert not torch.equal(fake(x), full)
    fake(x).sum().backward()
    assert layer.weight.grad is not None
    for other in (copy.deepcopy(fake), pickle.loads(pickle.dumps(fake))):
        assert type(other[0]) is type(fake[0]) and torch.equal(other(x), fake(x))
    quantize_(fake, mixdq_config(config))
    assert type(fake[0]) is kind and torch.equal(fake(x), real(x))


def test_a_weight_that_a_layer_changes_itself_is_rounded_then():
    model = nn.Sequential(Standardised(3, 4, 3))
    x, changed = torch.randn(1, 3, 6, 6), nn.Sequential(nn.Conv2d(3, 4, 3))
    changed.load_state_dict({"0.weight": model[0].weight - 0.5, "0.bias": model[0].bias})
    for m in (model, changed):
        quantize_(m, mixdq_config(Plan({"0": W8A8}), mode="fake"))
    assert torch.equal(model(x), changed(x))


class Alone(nn.Linear):
    """A layer whose own forward does not call super().forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


def test_layers_that_multiply_themselves_are_refused_in_fake_mode():
    model = nn.Sequential(nn.Linear(8, 8), Alone(8, 8))
    plan = Plan({"0": W8A8, "1": W8A8})
    with pytest.raises(QuantizationError, match="layer '1': Alone.forward does not call super"):
        quantize_(model, mixdq_config(plan, mode="fake"))
    assert [type(m) for m in model] == [nn.Linear, Alone]
    quantize_(model, mixdq_config(plan))


def test_layers_that_torch_never_calls_are_refused_in_fake_mode():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for name, says in (("self_attn.out_proj", "MultiheadAttention reads its weight"), ("linear1", "set_fastpath_ena")):
        with pytest.raises(QuantizationError, match=f"layer '{name}': .*{says}"):
            quantize_(model, mixdq_config(Plan({name: W8A8, "linear2": W8A8}), mode="fake"))
        assert type(model.linear2) is nn.Linear
    x = torch.randn(2, 3, 8)
    full = model(x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        quantize_(model, mixdq_config(Plan({"linear1": LayerPlan(weight_bits=2)}), mode="fake"))
        with torch.no_grad():
            assert not torch.allclose(model(x), full)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3))
    quantize_(model, mixdq_config(Plan({"0": W8A8})))
    with torch.no_grad():
        assert is_quantized(model[0].weight) and model(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("name", ["re:b", "_default", "re:b.c"])
def test_names_that_torchao_reads_as_rules_are_refused(name):
    with pytest.raises(PlanError, match=f"layer '{name}': torchao reads '_default'"):
        mixdq_config(Plan({"a": W8A8, name: W8A8}))
    assert "a" in mixdq_config(Plan({"a": W8A8, name: LayerPlan()})).fqn_to_config
    with pytest.raises(PlanError, match="layer '_default': torchao reads"):
        mixdq_config(Plan({}), overrides={"_default": Int8WeightOnlyConfig()})


def test_lazy_layers_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3))
    with pytest.raises(PlanError, match="layer '1': is lazy .* call the model once"):
        quantize_(model, mixdq_config(Plan({"0": W8A8, "1": W8A8})))
    assert not is_quantized(model[0].weight)
    with pytest.raises(PlanError, match="layer '1': is lazy"):
        Plan({"0": W8A8}).summary(model)


@pytest.mark.parametrize("key", ["0.weight", "re:0[.]weight", "re:.*weight"])
def test_overrides_of_weights_win_over_the_plan(key):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quantize_(model, mixdq_config(Plan({"0": W8A8}), overrides={key: None}))
    assert not is_quantized(model[0].weight)
