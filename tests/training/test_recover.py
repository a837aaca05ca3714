"""recover: the loss falls, what was trained is what is stored, a killed run goes on to the bit, bad input is named."""

from __future__ import annotations

import copy
import io
import json
import math
from dataclasses import fields, replace

import pytest
import safetensors.torch as st
import torch
from rich.console import Console
from torch import nn

from mixdq_ao import (
    CheckpointError,
    LayerPlan,
    MemoryEfficientAdamW,
    MixDQError,
    OptimizerError,
    Plan,
    PlanError,
    QuantizationError,
    load_quantized,
    mixdq_config,
    quantize_,
    recover,
    save_quantized,
)
from mixdq_ao.models.declared import known_plan
from mixdq_ao.models.flatten import flatten
from mixdq_ao.quantize.config import MixDQLayerConfig, quantized_weight
from mixdq_ao.quantize.quantizer import act_params, fake_quantize_act
from mixdq_ao.quantize.tensor import MixDQTensor, is_quantized
from mixdq_ao.training import recover_loop, recover_targets
from mixdq_ao.training.averaging import Average
from mixdq_ao.training.recover_blocks import find_blocks
from mixdq_ao.training.recover_grid import rounded_input, weight_on_grid
from mixdq_ao.training.recover_layers import make_student, students
from mixdq_ao.training.recover_options import Recipe, RecipeOptions
from mixdq_ao.training.recover_state import load_optimizer, optimizer_tensors
from mixdq_ao.training.recover_targets import Targets, record

from ..conftest import small_unet, unet_inputs
from ..default_dtype import default_dtype
from .toy_pipeline import PROMPTS, ToyPipe, again, tiny_pipe, toy_calibration, toy_plan

FAST = {"trajectory": (1, 2), "batch_size": 6, "evaluate_every": 5, "average": 0.8, "lr": 2e-2}


@pytest.fixture(scope="module")
def subject():
    """A tiny pipeline and its calibration."""
    pipe = tiny_pipe()
    return pipe, toy_calibration(pipe)


@pytest.fixture
def pipe(subject) -> ToyPipe:
    return again(subject[0])


@pytest.fixture(scope="module")
def plan(subject) -> Plan:
    return toy_plan(*subject)


@pytest.fixture(scope="module")
def large():
    """The small UNet in a pipeline, and a plan for it: split shortcuts, shared inputs."""
    pipe = ToyPipe(small_unet())
    return pipe, toy_plan(pipe, toy_calibration(pipe))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Plain tensors of a model, packed ones too."""
    return {k: t.detach().clone() for k, t in flatten(dict(model.named_parameters())).tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- rounding that can be trained through ---


def test_gradient_of_a_rounded_weight():
    """Against the definition: straight through where the code moves freely, nothing outwards beyond the ends."""
    torch.manual_seed(0)
    w = (torch.randn(5, 40) * 2).double()
    scale, zero = torch.rand(5, 1).double() + 0.5, torch.tensor([[0.0], [1], [2], [3], [1]]).double()
    g = torch.randn(5, 40).double()
    w.requires_grad_()
    scale.requires_grad_()
    y = weight_on_grid(w, scale, zero, 0, 3)
    y.backward(g)
    free = torch.round(w / scale) + zero
    codes = free.clamp(0, 3)
    assert torch.equal(y, (codes - zero) * scale)
    outward = ((free > 3) & (g < 0)) | ((free < 0) & (g > 0))
    assert torch.equal(w.grad, torch.where(outward, 0, g)) and outward.any() and (free != codes).any()
    residual = torch.where(free == codes, codes - zero - w / scale, codes - zero)
    torch.testing.assert_close(scale.grad, (g * residual).sum(1, keepdim=True))


def test_gradient_of_a_rounded_input():
    """Against differences of the expected value: noise added before rounding makes it smooth (a dithered quantizer)."""
    torch.manual_seed(0)
    x = torch.randn(4000).double() * 1.5
    x = torch.cat([x, torch.tensor([50.0, -50.0]).double()]).float()
    ends, g = torch.tensor([-2.0, 3.0], requires_grad=True), torch.randn(4002)
    x.requires_grad_()
    y = rounded_input(x, ends, 8)
    assert torch.equal(y, fake_quantize_act(x, act_params(-2.0, 3.0, 8)))
    y.backward(g)
    low, high = x < -2.0 - 0.02, x > 3.0 + 0.02
    assert torch.equal(x.grad[low | high], torch.zeros(int((low | high).sum())))
    middle = (x > -1.9) & (x < 2.9)
    assert torch.equal(x.grad[middle], g[middle])
    # the ends move what is clamped to them; what lies inside only by its rounding error, half a step of 255 at most
    slack = g.abs().sum() * 0.5 / 255
    for i, outside in enumerate((low, high)):
        assert abs(ends.grad[i] - g[outside].sum()) <= slack + g.abs().max() and abs(ends.grad[i]) > 1


# --- the student ---


@pytest.mark.parametrize(
    "fields", [{}, {"weight_range": "mse"}, {"symmetric": True}], ids=["minmax", "mse", "symmetric"]
)
def test_an_untrained_student_holds_the_codes_of_its_plan(pipe, subject, fields):
    plan = toy_plan(pipe, subject[1], 4, **fields)
    student = copy.deepcopy(pipe.unet)
    make_student(student, mixdq_config(plan, mode="fake"), scales=True, ranges=True, rank=0)
    layers = dict(students(student))
    assert {n for n, v in plan.layers.items() if v.quantized} == set(layers)
    for name, config in mixdq_config(plan).fqn_to_config.items():
        assert isinstance(config, MixDQLayerConfig)
        wanted = quantized_weight(pipe.unet.get_submodule(name).weight, config).stored_tensors()
        found = layers[name].quantizer.packed(layers[name].weight).stored_tensors()
        assert same(wanted, found), name
    assert layers["conv_in"].quantizer.plan() == plan.layers["conv_in"]


def test_an_untrained_student_computes_as_fake_mode(large):
    pipe, plan = large
    torch.manual_seed(1)
    inputs = unet_inputs()
    student, fake = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.unet)
    make_student(student, mixdq_config(plan, mode="fake"), scales=True, ranges=False, rank=0)
    quantize_(fake, mixdq_config(plan, mode="fake"))
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs)[0], fake(**inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_type_changes_no_student(large, dtype):
    pipe, plan = large
    config, inputs = mixdq_config(plan, mode="fake"), unet_inputs()
    found = [copy.deepcopy(pipe.unet) for _ in range(2)]
    make_student(found[0], config, scales=True, ranges=True, rank=2)
    with torch.no_grad(), default_dtype(dtype):
        make_student(found[1], config, scales=True, ranges=True, rank=2)
        other = found[1](**inputs)[0]
        assert torch.equal(found[0](**inputs)[0], other)
    assert same(*(dict(student.named_parameters()) for student in found))


def test_layers_that_read_one_tensor_share_its_range(large):
    pipe, plan = large
    student = copy.deepcopy(pipe.unet)
    make_student(student, mixdq_config(plan, mode="fake"), scales=False, ranges=True, rank=0)
    layers = {n: m.quantizer for n, m in students(student)}
    q, k = (next(v for n, v in layers.items() if n.endswith(f"attn1.to_{c}")) for c in "qk")
    text = [v for n, v in layers.items() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert q.inputs[0] is k.inputs[0] and len({id(v.inputs[0]) for v in text}) == 1
    split = next(v for v in layers.values() if v.layer.split is not None)
    assert len(split.inputs) == 2 and split.scale.shape[0] == 2


def test_blocks_hold_every_quantized_layer_once(large):
    pipe, plan = large
    student = copy.deepcopy(pipe.unet)
    make_student(student, mixdq_config(plan, mode="fake"), scales=False, ranges=False, rank=0)
    blocks = find_blocks(student)
    for name, _ in students(student):
        assert sum(name == b or name.startswith(f"{b}.") for b in blocks) == 1, name
    assert "mid_block.resnets.0" in blocks and "mid_block.attentions.0.transformer_blocks.0" in blocks


# --- recorded trajectories ---


def test_recorded_calls_give_the_recorded_outputs(pipe):
    targets = record(pipe, PROMPTS[:5], trajectory=(1, 3), seed=4, batch_size=2)
    assert targets.spans == [(0, 5), (5, 20)] and len(targets.outputs) == 20
    rows = targets.fields[("encoder_hidden_states",)]
    assert len(rows.pool) == 10 and rows.pool.dtype is torch.float16  # once a prompt and trajectory, not once a call
    samples = torch.tensor([3, 17, 0, 9])  # of different steps in one batch
    (args, kwargs), wanted = targets.batch(samples, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(*args, **kwargs)[0], wanted, rtol=1e-5, atol=1e-5)


def test_power_is_computed_once_in_pieces(monkeypatch):
    monkeypatch.setattr(recover_targets, "AT_ONCE", 7)
    outputs = torch.randn(5, 3, 4)
    targets, expected = Targets({}, {}, outputs, [(0, 5)]), outputs.double().square().mean().item()
    outputs.zero_()
    assert targets.power == pytest.approx(expected, rel=1e-12)


def test_every_sample_comes_once_before_any_comes_again(pipe):
    targets = record(pipe, PROMPTS[:5], trajectory=(1, 3), seed=4)
    steps = [targets.choose(step, 6, 7) for step in range(10)]
    assert all(len(s) == 6 and int((s < 5).sum()) == 3 for s in steps)
    first = torch.cat([s[s < 5] for s in steps])
    assert all(sorted(first[i : i + 5].tolist()) == list(range(5)) for i in range(0, 30, 5))
    assert torch.equal(targets.choose(7, 6, 7), steps[7])


def test_calls_that_differ_in_kind_are_refused(pipe):
    class Changing(ToyPipe):
        """Leaves an argument out in its second call."""

        def __call__(self, prompt, **kwargs):
            x, inputs = torch.randn(len(prompt), 4, 8, 8), unet_inputs(len(prompt))
            del inputs["sample"]
            self.unet(x, **inputs)
            del inputs["return_dict"]
            self.unet(x, **inputs)

    with pytest.raises(MixDQError, match="called in different ways"):
        record(Changing(pipe.unet), PROMPTS[:1], trajectory=(1,), seed=0)


# --- training ---


@pytest.mark.parametrize(
    "options, gain",
    [
        ({}, 2.0),
        ({"block_steps": 10, "block_weight": 0.5, "learn_ranges": True}, 1.7),
        ({"train": "low_rank", "rank": 3}, 1.2),
        ({"learn_scales": False, "make_optimizer": torch.optim.AdamW}, 1.3),
    ],
    ids=["end to end", "blocks", "low rank", "fixed scales, own optimizer"],
)
def test_the_error_falls_and_integers_hold_it(pipe, plan, options, gain):
    """``gain``: factor of the error power on held-out prompts after 25 steps."""
    found = recover(pipe, plan, PROMPTS, steps=25, **FAST, **options)
    assert found.status == "finished" and found.after <= found.before / gain, (found.before, found.after)
    assert found.after == min(h["error"] for h in found.history) and len(found.history) == 6
    weights = {n: is_quantized(m.weight) for n, m in pipe.unet.named_modules() if n in plan.layers}
    assert weights == {n: v.quantized for n, v in plan.layers.items()}
    # integer products and float sums round apart, and some codes of later layers with them
    assert abs(found.real - found.after) <= 0.02 * found.after


def test_a_recovered_unet_is_saved_and_loaded(large, tmp_path):
    pipe, plan = again(large[0]), large[1]
    found = recover(pipe, plan, PROMPTS, steps=6, **{**FAST, "evaluate_every": 3})
    assert found.after < found.before and abs(found.real - found.after) <= 0.02 * found.after
    save_quantized(pipe.unet, tmp_path / "unet", plan=found.plan)
    assert same(state_of(load_quantized(tmp_path / "unet")), state_of(pipe.unet))


def test_a_recovered_unet_knows_what_it_holds_as_a_quantized_one_does(large, tmp_path):
    """diffusers' own saving works, and each layer knows its plan."""
    pipe, plan = again(large[0]), large[1]
    found = recover(pipe, plan, PROMPTS, steps=2, **{**FAST, "evaluate_every": 1})
    known, quantized = known_plan(pipe.unet), {n: v for n, v in found.plan.layers.items() if v.quantized}
    assert known is not None and known.layers == found.plan.layers
    assert {n: m.layer_plan for n, m in pipe.unet.named_modules() if hasattr(m, "layer_plan")} == quantized
    pipe.unet.save_pretrained(tmp_path / "unet")
    loaded = type(pipe.unet).from_pretrained(tmp_path / "unet")
    assert same(state_of(loaded), state_of(pipe.unet))


def test_real_layers_give_what_the_student_gave(large):
    """Layer by layer, from the same inputs: within 3e-6 of the largest output."""
    pipe, plan = large
    torch.manual_seed(2)
    student = copy.deepcopy(pipe.unet)
    make_student(student, mixdq_config(plan, mode="fake"), scales=True, ranges=True, rank=0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * p.abs().mean().clamp(min=0.2) * 0.2)
    for name, module in students(student):
        q = module.quantizer
        if q.bos_embedding is not None:
            x = torch.randn(2, 7, module.in_features)
            x[:, 0] = q.bos_embedding
        else:
            shape = (2, 7, module.in_features) if isinstance(module, nn.Linear) else (2, module.in_channels, 8, 8)
            x = torch.randn(shape)
        real = copy.deepcopy(pipe.unet.get_submodule(name))
        with torch.no_grad():
            real.weight = nn.Parameter(q.packed(module.weight), requires_grad=False)
            if module.bias is not None:
                real.bias.copy_(module.bias)
            a, b = module(x), real(x)
        assert (a - b).abs().max() <= 3e-6 * a.abs().max(), name
        if q.bos_output is not None:
            assert torch.equal(b[:, 0], q.bos_output.detach().expand(2, -1))


def test_ranges_that_were_trained_are_in_the_plan(pipe, plan):
    found = recover(pipe, plan, PROMPTS, steps=10, learn_ranges=True, **FAST)
    changed = [n for n, v in found.plan.layers.items() if v.act_range != plan.layers[n].act_range]
    assert len(changed) > 10
    weight = pipe.unet.get_submodule(changed[0]).weight
    assert isinstance(weight, MixDQTensor) and weight.act_scale is not None
    lo, hi = found.plan.layers[changed[0]].act_range
    assert weight.act_scale.item() == act_params(lo, hi, 8).scale


def test_half_precision_parameters(subject):
    """bfloat16 steps by its remainders: learning rates whose steps bfloat16 would round away still train."""
    pipe = again(subject[0])
    pipe.unet.to(torch.bfloat16)
    found = recover(pipe, toy_plan(pipe, toy_calibration(pipe)), PROMPTS, steps=20, **{**FAST, "lr": 5e-3})
    assert found.after < found.before / 1.15 and abs(found.real - found.after) <= 0.1 * found.after


def test_new_noise_when_asked(pipe, plan):
    recover(pipe, plan, PROMPTS, steps=6, refresh=2, **FAST)
    held, learned = 1, len(PROMPTS) - 1
    assert pipe.drawn == 2 * (held + 3 * learned)


def test_bars_on_a_terminal(pipe, plan, monkeypatch):
    """That of recording inside that of training, which rich refused before 14.1."""
    shown = io.StringIO()
    monkeypatch.setattr("mixdq_ao.progress.console", Console(file=shown, force_terminal=True, width=120))
    recover(pipe, plan, PROMPTS, steps=3, refresh=2, **FAST)
    assert "recording held-out prompts" in shown.getvalue() and "recovering" in shown.getvalue()


# --- stopping, and going on ---


def test_a_killed_run_goes_on_to_the_bit(subject, plan, tmp_path):
    class Killed(Exception):
        pass

    def kill(found):
        if found["step"] == 10:
            raise Killed

    options = {**FAST, "steps": 16, "block_steps": 6, "refresh": 12, "learn_ranges": True}
    whole, parts, untouched = (again(subject[0]) for _ in range(3))
    a = recover(whole, plan, PROMPTS, **options)
    place = tmp_path / "run"
    with pytest.raises(Killed):  # before the checkpoint of step 10: goes on from step 8
        recover(parts, plan, PROMPTS, **options, checkpoint=place, save_every=4, on_evaluation=kill)
    assert same(state_of(parts.unet), state_of(untouched.unet))  # an interrupted run changes nothing
    assert json.loads((place / "run.json").read_text())["progress"]["step"] == 8
    for name in ("state-9.safetensors.part", ".state-12.safetensors.0123abcd"):  # what killed runs were writing
        (place / name).touch()
    b = recover(parts, plan, PROMPTS, **options, checkpoint=place, save_every=4)
    assert same(state_of(whole.unet), state_of(parts.unet))
    assert a.history == b.history and a.after == b.after and len(list(place.iterdir())) == 2
    third = again(subject[0])  # a finished run gives its result at once
    c = recover(third, plan, PROMPTS, **options, checkpoint=place, on_evaluation=kill)
    assert same(state_of(whole.unet), state_of(third.unet)) and c.history == a.history


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8bit"])
def test_an_optimizer_through_plain_tensors_steps_the_same_bits(kind):
    def steps(p: nn.Parameter, optimizer: MemoryEfficientAdamW, numbers: range) -> None:
        for i in numbers:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            optimizer.step()

    def new() -> tuple[nn.Parameter, MemoryEfficientAdamW]:
        p = nn.Parameter(torch.linspace(-1, 1, 64 * 128).view(64, 128))
        return p, MemoryEfficientAdamW([p], moments=kind)

    (p, whole), (q, parts) = new(), new()
    steps(p, whole, range(9))
    steps(q, parts, range(4))
    held = {n: t.clone() for n, t in optimizer_tensors(parts, ["a/b"]).items()}
    assert all(type(t) is torch.Tensor for t in held.values()) and (
        kind != "8bit" or "optimizer/a/b/exp_avg.codes" in held
    )
    r, other = new()
    r.data.copy_(q.data)
    load_optimizer(other, ["a/b"], held)
    steps(r, other, range(4, 9))
    assert torch.equal(p, r)
    if kind == "8bit":
        held["optimizer/a/b/exp_avg.scale"] = held["optimizer/a/b/exp_avg.scale"][:-1]
        with pytest.raises(CheckpointError, match="do not fit each other"):
            load_optimizer(other, ["a/b"], held)


def test_divergence_keeps_the_best_state(pipe, plan):
    class Wild(torch.optim.SGD):
        """Good steps, then one that ruins the weights."""

        def __init__(self, groups):
            super().__init__(groups, lr=1.0)
            self.inner, self.count = torch.optim.AdamW(groups, weight_decay=0), 0

        def step(self, closure=None):
            self.count += 1
            for group, mine in zip(self.inner.param_groups, self.param_groups, strict=True):
                group["lr"] = mine["lr"] * (1 if self.count <= 22 else 1e5)
            self.inner.step()

    with pytest.warns(RuntimeWarning, match=r"recover stopped at step 2\d: .* kept the state of step 20"):
        found = recover(pipe, plan, PROMPTS, steps=60, make_optimizer=Wild, **{**FAST, "evaluate_every": 20})
    assert found.status.startswith("stopped") and found.best_step == 20
    assert found.after < found.before and abs(found.real - found.after) <= 0.02 * found.after


def test_a_loss_of_nan_stops_before_anything_is_stepped(pipe, plan):
    with pytest.warns(RuntimeWarning, match="the loss is nan"):
        found = recover(pipe, plan, PROMPTS, steps=20, make_optimizer=_poisoned, **FAST)
    assert math.isfinite(found.real) and found.after <= found.before


def _poisoned(groups):
    class Poison(torch.optim.AdamW):
        def step(self, closure=None):
            super().step()
            if self.state[groups[0]["params"][0]]["step"] == 7:
                groups[0]["params"][0].data.fill_(math.nan)

    return Poison(groups, weight_decay=0)


def test_average_and_its_exchange():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3))
    average, reference = Average({"p": p}, 0.9), p.detach().double().clone()
    for step in range(1, 30):
        with torch.no_grad():
            p.add_(torch.randn(3))
        average.update({"p": p.detach()}, step)
        decay = min(0.9, (1 + step) / (10 + step))
        reference = decay * reference + (1 - decay) * p.detach().double()
    torch.testing.assert_close(average.values["p"].double(), reference, rtol=1e-5, atol=1e-6)
    own, version = p.detach().clone(), p._version
    with average.applied():
        assert torch.equal(p.detach(), average.values["p"])
    assert torch.equal(p.detach(), own) and p._version == version


def test_rates():
    recipe = Recipe(steps=100, warmup=0.1)
    rates = [recipe.rate(s) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1 and 0.02 <= rates[-1] < 0.021
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


# --- errors ---


def test_bad_input_is_named_and_changes_nothing(pipe, plan, tmp_path):
    before = state_of(pipe.unet)
    other = Plan({"down_blocks.7.conv": LayerPlan(weight_bits=4)})
    bare = Plan.uniform(pipe.unet, 2, 8)
    needy = plan.with_layers({"conv_in": replace(plan.layers["conv_in"], weight_bits=4, weight_range="output")})
    (tmp_path / "file").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    half = plan.with_layers({"conv_in": replace(plan.layers["conv_in"], weight_bits=16)})
    cases = [
        (MixDQError, "prompts is empty", {"prompts": []}),
        (MixDQError, "prompts holds one text", {"prompts": PROMPTS[:1]}),
        (MixDQError, "prompt 1 is ' '", {"held_out": ["a", " "]}),
        (OptimizerError, "steps is 0, expected a whole number of at least 1", {"steps": 0}),
        (OptimizerError, "steps is 2.5", {"steps": 2.5}),
        (OptimizerError, "block_steps is 9, expected at most the 5 steps", {"block_steps": 9}),
        (OptimizerError, "lr is nan", {"lr": math.nan}),
        (OptimizerError, "train is 'all', expected one of weights, low_rank", {"train": "all"}),
        (OptimizerError, "no option 'learning_rate'", {"learning_rate": 1e-3}),
        (OptimizerError, "trajectory is 0", {"trajectory": (0,)}),
        (OptimizerError, "batch_size is 1, expected at least 2", {"batch_size": 1}),
        (OptimizerError, "adam_moments is '4bit'", {"adam_moments": "4bit"}),
        (OptimizerError, "guidance_scale is nan", {"guidance_scale": math.nan}),
        (MixDQError, "save_every is 0", {"save_every": 0}),
        (CheckpointError, "file is no folder; choose another checkpoint", {"checkpoint": tmp_path / "file"}),
        (CheckpointError, "file is no folder; choose another checkpoint", {"checkpoint": tmp_path / "file" / "run"}),
        (CheckpointError, "holds a model (model_index.json)", {"checkpoint": tmp_path / "model"}),
        (PlanError, "layer 'down_blocks.7.conv' is not a linear or convolution layer", {"plan": other}),
        (PlanError, "there is nothing to recover", {"plan": Plan({"conv_in": LayerPlan()})}),
        (PlanError, "no act_range", {"plan": bare}),
        (PlanError, "layer 'conv_in': weight_range is 'output'", {"plan": needy}),
        (PlanError, "layer 'conv_in': 16-bit weights with 8-bit activations", {"plan": half}),
    ]
    for error, words, changed in cases:
        given = {"plan": plan, "prompts": PROMPTS, "steps": 5, **FAST, "checkpoint": tmp_path / "run", **changed}
        with pytest.raises(error) as raised:
            recover(pipe, given.pop("plan"), given.pop("prompts"), **given)
        assert words in str(raised.value), (words, raised.value)
    assert same(state_of(pipe.unet), before) and not (tmp_path / "run").exists() and pipe.drawn == 0
    quantize_(pipe.unet, mixdq_config(plan))
    with pytest.raises(QuantizationError, match="quantized already"):
        recover(pipe, plan, PROMPTS, steps=5, **FAST)


def test_the_keyword_arguments_are_the_fields_of_a_recipe():
    """Of the same types, but for a trajectory, which recover takes in more forms."""
    types = {field.name: field.type for field in fields(Recipe) if field.name not in ("steps", "trajectory")}
    options = {name: given.__forward_arg__ for name, given in RecipeOptions.__annotations__.items()}
    assert options.pop("trajectory") and options == types


def test_checkpoints_that_do_not_fit(subject, plan, tmp_path):
    place, options = tmp_path / "run", {**FAST, "steps": 4, "checkpoint": tmp_path / "run"}
    recover(again(subject[0]), plan, PROMPTS, **options)
    tensors = place / "state-4.safetensors"
    whole, document = tensors.read_bytes(), (place / "run.json").read_text()
    contents = st.load_file(tensors)
    metadata = {"fingerprint": json.loads(document)["fingerprint"], "step": "4"}

    def fails(words: str, **changed) -> None:
        pipe = again(subject[0])
        with pytest.raises((CheckpointError, OptimizerError)) as raised:
            recover(pipe, plan, PROMPTS, **{**options, **changed})
        assert words in str(raised.value), (words, raised.value)
        assert same(state_of(pipe.unet), state_of(subject[0].unet))
        tensors.write_bytes(whole)
        (place / "run.json").write_text(document)

    fails("is of another run: lr was 0.02 there and is 0.002 now", lr=2e-3)
    name = next(n for n in contents if n.startswith("parameters/") and contents[n].dim() == 2)
    st.save_file({**contents, name: contents[name].T.contiguous()[:-1].contiguous()}, tensors, metadata)
    fails(f"{name!r} is torch.float32 of shape")
    st.save_file({n: t for n, t in contents.items() if n != name}, tensors, metadata)
    fails(f"{name!r} is missing")
    st.save_file({**contents, "best/nothing": torch.zeros(1)}, tensors, metadata)
    fails("'best/nothing' belongs to no parameter")
    moment = next(n for n in contents if n.endswith("/exp_avg") and contents[n].dim() == 2)
    st.save_file({**contents, moment: contents[moment][:-1].contiguous()}, tensors, metadata)
    fails("exp_avg")
    st.save_file(contents, tensors, {**metadata, "step": "3"})
    fails("is not the file run.json was written with")
    tensors.write_bytes(whole[:-5])
    fails("damaged")
    (place / "run.json").write_text(document.replace('"best_step": ', '"best_step": -1'))
    fails("best_step")
    (place / "run.json").write_text("{")
    fails("not valid JSON")


def test_what_differs_from_a_stored_run_is_named(subject, plan, tmp_path, monkeypatch):
    """A finished run is not lengthened: its learning rate has fallen to the end already."""
    place, options = tmp_path / "run", {**FAST, "steps": 4, "checkpoint": tmp_path / "run"}
    recover(again(subject[0]), plan, PROMPTS, **options)

    def fails(words: str, chosen: Plan = plan, **changed) -> None:
        pipe, before = again(subject[0]), (place / "run.json").read_bytes()
        with pytest.raises(CheckpointError) as raised:
            recover(pipe, chosen, PROMPTS, **{**options, **changed})
        assert words in str(raised.value) and len(str(raised.value).splitlines()) == 1, (words, raised.value)
        assert same(state_of(pipe.unet), state_of(subject[0].unet)) and (place / "run.json").read_bytes() == before

    fails("run: steps was 4 there and is 8 now (a run cannot be lengthened", steps=8)
    fails(
        "run: rank was 16 there and is 2 now, train was 'weights' there and is 'low_rank' now", train="low_rank", rank=2
    )
    fails("model, plan, prompts, moments, optimizer", toy_plan(*subject, weight_range="mse"))
    fails("optimizer", make_optimizer=torch.optim.AdamW)
    fails("moments", moments={"conv_in": torch.eye(36)})
    other = {**recover_loop.CONSTANTS, "rate_of_bits": [[2, 0.5]]}
    monkeypatch.setattr(recover_loop, "CONSTANTS", other)
    fails("or release of mixdq_ao")
