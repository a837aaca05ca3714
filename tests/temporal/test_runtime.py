"""A model prepared for levels: one attribute switches it, one graph per level, driven by the pipeline's own steps."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SCMScheduler,
)
from torch import nn

from mixdq_ao import (
    CalibrationError,
    LayerPlan,
    Plan,
    PlanError,
    QuantizationError,
    ScheduleError,
    TemporalPlan,
    calibrate,
    mixdq_config,
    prepare,
)
from mixdq_ao import quantize_ as quantize
from mixdq_ao.compat import uncompiled
from mixdq_ao.temporal.follow import Steps, step_count, timesteps_of

from ..conftest import unet_inputs
from ..quantize.reference import assert_close


class Small(nn.Module):
    """Two layers called like a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.proj = nn.Linear(4, 4)

    def forward(self, sample, timestep, return_dict=False):
        y = self.conv(sample)
        return (self.proj(y.movedim(1, -1)).movedim(-1, 1) + timestep.reshape(-1, 1, 1, 1).float() * 1e-3,)


class Pipe:
    """The loop of a diffusers pipeline, with guidance in two calls where asked."""

    def __init__(self, unet, scheduler, guided: bool = False) -> None:
        self.unet, self.scheduler, self.guided = unet, scheduler, guided
        self.seen: list[str] = []

    def __call__(self, steps: int, begin: int = 0, transform=lambda t: t):
        self.scheduler.set_timesteps(steps)
        x = torch.zeros(2, 4, 8, 8)
        for t in self.scheduler.timesteps[begin:]:
            for _ in range(2 if self.guided else 1):
                self.unet(x, transform(t), return_dict=False)
                self.seen.append(uncompiled(self.unet).conv.level)


class Stepping(Pipe):
    """Also takes the steps, by which the scheduler knows where it is."""

    def __call__(self, steps: int, begin: int = 0, transform=lambda t: t):
        self.scheduler.set_timesteps(steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        x = torch.zeros(2, 4, 8, 8)
        for t in timesteps_of(self.scheduler)[begin:]:
            y = self.unet(x, transform(t), return_dict=False)[0]
            self.seen.append(self.unet.conv.level)
            x = self.scheduler.step(y, t, x, return_dict=False)[0]


def small_plan(steps: str, names: str = "abcd") -> TemporalPlan:
    range_ = {"act_range": (-4.0, 4.0)}
    levels = {"a": None}
    for name, bits in zip("bcd", (8, 4, 2), strict=True):
        levels[name] = Plan({n: LayerPlan(weight_bits=bits, act_bits=8, **range_) for n in ("conv", "proj")})
    return TemporalPlan({n: levels[n] for n in names}, tuple(steps))


def followed(scheduler, steps: str, **options):
    """A pipeline that notes the level of each call."""
    runtime = prepare(Small(), small_plan(steps))
    pipe = Pipe(runtime.model, scheduler, **options)
    runtime.follow(pipe)
    return runtime, pipe


def test_levels_share_one_weight_and_own_storage_is_quantize(unet, calibration):
    plans = {f"W{b}A8": Plan.uniform(unet, b, 8).with_calibration(calibration) for b in (8, 4)}
    plan = TemporalPlan({"16": None, **plans}, ("16", "W4A8"))
    torch.manual_seed(3)
    inputs = unet_inputs()
    with torch.no_grad():
        full = unet(**inputs)[0]
        own = prepare(copy.deepcopy(unet), plan, storage="own", keep_full=True)
        nested = prepare(copy.deepcopy(unet), plan)
        own.level = "16"
        assert torch.equal(own.model(**inputs)[0], full)
        for name, level in plans.items():
            reference = copy.deepcopy(unet)
            quantize(reference, mixdq_config(level))
            own.level = nested.level = name
            expected = reference(**inputs)[0]
            assert torch.equal(own.model(**inputs)[0], expected)
            noise = (expected - full).square().mean()
            assert (nested.model(**inputs)[0] - full).square().mean() < 2 * noise
        nested.level = "16"
        weights_only = (nested.model(**inputs)[0] - full).square().mean()
        nested.level = "W8A8"
        assert 0 < weights_only < (nested.model(**inputs)[0] - full).square().mean()
    assert nested.bytes() < own.bytes()


def test_one_graph_for_each_level_and_none_after_that():
    from torch._dynamo.testing import CompileCounter

    runtime, counter = prepare(Small(), small_plan("abcd")), CompileCounter()
    torch._dynamo.reset()
    pipe = Pipe(torch.compile(runtime.model, backend=counter, fullgraph=True), DDIMScheduler())
    runtime.follow(pipe)
    pipe(4)
    assert counter.frame_count == 4
    with torch.compiler.set_stance("fail_on_recompile"):
        runtime.plan = small_plan("dcba")
        pipe(4)
        pipe(4)
    assert counter.frame_count == 4


def test_another_batch_size_makes_up_to_three_graphs_for_each_level():
    """The limit that ``prepare`` names for 3 levels: enough, and none less is."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    runtime = prepare(Small(), small_plan("abc"))
    for limit, enough in ((8, False), (9, True)):
        torch._dynamo.reset()
        compiled = torch.compile(runtime.model, backend="eager", fullgraph=True)
        calls = [(batch, level) for batch in (3, 1, 2, 4, 1, 3) for level in "abc"]
        expected = nullcontext() if enough else pytest.raises(FailOnRecompileLimitHit)
        with torch._dynamo.config.patch(recompile_limit=limit), expected:
            for batch, runtime.level in calls:
                compiled(torch.zeros(batch, 4, 8, 8), torch.tensor(500))


COPIES = {
    "deepcopy": lambda runtime, pipe: (None, copy.deepcopy(pipe)),
    "runtime first": lambda runtime, pipe: copy.deepcopy((runtime, pipe)),
    "runtime last": lambda runtime, pipe: copy.deepcopy((pipe, runtime))[::-1],
}


@pytest.mark.parametrize("compiled", [None, "before", "after"])
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_follows_by_itself(copied, compiled):
    """Its own scheduler, and levels of its own, also where torch drops the hooks of what it compiled."""
    torch._dynamo.reset()
    runtime, pipe = followed(DDIMScheduler(), "abcd")
    if compiled:
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    if compiled == "before":
        runtime.follow(pipe)
    of_copy, clone = COPIES[copied](runtime, pipe)
    clone.scheduler = EulerDiscreteScheduler()
    clone(4)
    assert clone.seen == list("abcd") and runtime.level == "a" and not pipe.seen
    pipe(4)
    assert pipe.seen == list("abcd")
    if of_copy is not None:
        of_copy.unfollow()
        assert not any(m._forward_pre_hooks for m in (clone.unet, of_copy.model))
        runtime.plan = small_plan("dcba")
        of_copy.level = "b"
        pipe(4)
        assert pipe.seen == list("abcddcba") and of_copy.level == "b"
    runtime.unfollow()
    assert not any(m._forward_pre_hooks for m in (pipe.unet, runtime.model))


def test_a_copy_of_the_model_alone_follows_the_same_pipeline_at_its_own_level():
    runtime, pipe = followed(DDIMScheduler(), "abcd")
    other = copy.copy(pipe)
    other.unet, other.seen = copy.deepcopy(pipe.unet), []
    assert next(iter(other.unet._forward_pre_hooks.values())).runtime.followed is pipe
    other(4)
    assert other.seen == list("abcd") and runtime.level == "a"


@pytest.mark.parametrize("compiled", [False, True])
def test_what_was_stored_does_not_run_until_it_follows_a_pipeline_again(compiled):
    torch._dynamo.reset()
    runtime, pipe = followed(DDIMScheduler(), "abcd")
    if compiled:
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
        runtime.follow(pipe)
    stored = pickle.loads(pickle.dumps(runtime))
    for model in (stored.model, pickle.loads(pickle.dumps(pipe.unet))):
        with pytest.raises(ScheduleError, match="followed a pipeline, which was not stored with it; store the runtime"):
            Pipe(model, DDIMScheduler())(4)
    other = Pipe(stored.model, DDIMScheduler())
    stored.follow(other)
    other(4)
    assert other.seen == list("abcd") and runtime.level == "a"


def test_compiling_after_following_never_silently_loses_the_schedule():
    """Either the compiled model follows, or the compiler refuses."""
    runtime, pipe = followed(DDIMScheduler(), "abca")
    torch._dynamo.reset()
    pipe.unet = torch.compile(runtime.model, backend="eager")
    pipe(4)
    assert pipe.seen == list("abca")


def test_inductor_gives_what_eager_does():
    """At 8 bits (planes put together) and at 4 (the high plane as it lies)."""
    runtime = prepare(Small(), small_plan("abcd"))
    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, fullgraph=True)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500)
    with torch.no_grad():
        for level in "bc":
            runtime.level = level
            torch.testing.assert_close(compiled(x, t)[0], runtime.model(x, t)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["nested", "own"])
def test_gradients_go_through_every_level(storage):
    """Those of the layers the integers stand for; ``weight`` gives their values at the present level."""
    runtime = prepare(Small(), small_plan("abcd"), storage=storage)
    x, t, g = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 4, 8, 8)
    for level in "abcd":
        runtime.level = level
        conv, proj = (layer.weight.detach().double() for layer in (runtime.model.conv, runtime.model.proj))
        inside = (g.double().movedim(1, -1) @ proj).movedim(-1, 1)
        expected = torch.nn.functional.conv_transpose2d(inside, conv, padding=1)
        x.requires_grad_()
        (found,) = torch.autograd.grad(runtime.model(x, t)[0], x, g)
        assert_close(found, expected, terms=40)


@pytest.mark.parametrize(
    ("scheduler", "repeats"),
    [
        (DDIMScheduler(), 1),
        (EulerDiscreteScheduler(), 1),
        (EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), 1),
        (LCMScheduler(), 1),
        (FlowMatchEulerDiscreteScheduler(), 1),
        (PNDMScheduler(skip_prk_steps=True), None),
        (HeunDiscreteScheduler(), None),
        (KDPM2DiscreteScheduler(), None),
    ],
)
def test_every_scheduler_is_followed(scheduler, repeats):
    _, pipe = followed(scheduler, "abcdabcd", guided=True)
    pipe(8)
    calls = pipe.seen[::2]
    assert pipe.seen[1::2] == calls  # guidance's two halves at one level
    if repeats:
        assert calls == list("abcdabcd")
    else:  # several calls in a step: every level in order, none skipped
        assert [c for i, c in enumerate(calls) if i == 0 or c != calls[i - 1]] == list("abcdabcd")
    pipe.seen.clear()
    pipe(8)
    assert pipe.seen[::2] == calls


def test_a_run_that_begins_late_has_the_end_of_the_schedule():
    _, pipe = followed(EulerDiscreteScheduler(), "aabbccdd")
    pipe(8, begin=5)
    assert pipe.seen == list("cdd")


@pytest.mark.parametrize(
    "transform",
    [
        lambda t: t.expand(2),
        lambda t: t.expand(2).to(torch.bfloat16),
        lambda t: t.expand(2).to(torch.bfloat16) / 1000,
        lambda t: t.clone(),
    ],
)
def test_timesteps_in_other_guises(transform):
    _, pipe = followed(FlowMatchEulerDiscreteScheduler(shift=3.0), "abcdabcd")
    pipe(8, transform=transform)
    assert pipe.seen == list("abcdabcd")


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("begin", [0, 1])
def test_a_list_that_ends_at_a_thousandth_of_its_beginning(scale, begin):
    """Without a shift, flow matching goes from 1000 to 1: 1.0 is the last timestep, or a thousandth of the first."""
    _, pipe = followed(FlowMatchEulerDiscreteScheduler(), "abcd")
    for _ in range(2):
        pipe(4, begin=begin, transform=lambda t: t.clone() / scale)
    assert pipe.seen == list("abcd"[begin:] * 2)


def test_a_schedule_of_as_many_steps_is_not_resampled(recwarn):
    """These sigmas give two steps one timestep, rounded to a whole number."""
    scheduler = DPMSolverMultistepScheduler(use_exponential_sigmas=True)
    runtime, pipe = followed(scheduler, "ab" * 25)
    runtime.follow(pipe, resample=True)
    pipe(50)
    assert len(torch.unique_consecutive(scheduler.timesteps)) < 50
    assert pipe.seen == list("ab" * 25) and not [w for w in recwarn if "resampled" in str(w.message)]


def test_the_scheduler_may_be_exchanged():
    _, pipe = followed(DDIMScheduler(), "abcd")
    pipe.scheduler = EulerDiscreteScheduler()
    pipe(4)
    assert pipe.seen == list("abcd")


def test_another_number_of_steps_is_an_error_or_resampled():
    runtime, pipe = followed(DDIMScheduler(), "abcd")
    with pytest.raises(ScheduleError, match="for 4 steps, the scheduler runs 8"):
        pipe(8)
    runtime.follow(pipe, resample=True)
    with pytest.warns(UserWarning, match="resampled to 8") as warned:
        pipe(8)
        pipe(8)
    assert pipe.seen == list("aabbccdd") * 2 and len(warned) == 1
    runtime.unfollow()
    pipe.seen.clear()
    pipe(8)
    assert pipe.seen == ["d"] * 8


def test_a_timestep_of_another_pipeline_is_an_error():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    assert Steps().step_of(scheduler.timesteps, scheduler.timesteps[2].item(), 4) == 2
    with pytest.raises(ScheduleError, match="timestep 432 is none of the scheduler's 4"):
        Steps().step_of(scheduler.timesteps, torch.tensor(432), 4)
    assert step_count(torch.tensor([9.0, 5.0, 5.0, 1.0, 1.0]), 2) == 3
    assert step_count(torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0]), 2) == 3


ANOTHER_SCALE = {"Z-Image": lambda t: (1000 - t) / 1000, "Lumina2": lambda t: 1 - t / 1000, "an angle": torch.arctan}


@pytest.mark.parametrize("transform", ANOTHER_SCALE.values(), ids=ANOTHER_SCALE)
@pytest.mark.parametrize("begin", [0, 2])
def test_models_given_another_function_of_the_timestep(transform, begin):
    """Of a step some of these values are near another timestep's: (1000 - 750) / 1000 is 250 thousandths."""
    runtime = prepare(Small(), small_plan("abcd"))
    pipe = Stepping(runtime.model, FlowMatchEulerDiscreteScheduler())
    runtime.follow(pipe)
    pipe(4, begin, transform)
    pipe(4, begin, transform)
    assert pipe.seen == list("abcd"[begin:]) * 2


@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
     FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, LCMScheduler],
)  # fmt: skip
def test_the_schedulers_index_is_the_place_of_its_timestep(kind):
    """Calls with a copy of the timestep run at the levels of calls with the timestep itself."""
    seen = []
    for transform in (lambda t: t, lambda t: t.clone()):
        runtime = prepare(Small(), small_plan("abcd"))
        pipe = Stepping(runtime.model, kind())
        runtime.follow(pipe)
        pipe(4, transform=transform)
        seen.append("".join(pipe.seen))
    assert seen[0] == seen[1] and set(seen[0]) == set("abcd")


def test_a_pipeline_that_does_not_say_where_it_begins():
    """Z-Image's ControlNet pipeline; the first value is near none of the list."""
    runtime = prepare(Small(), small_plan("abcd"))
    pipe = Stepping(runtime.model, FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_begin_index = lambda index: None
    runtime.follow(pipe)
    pipe(4, transform=ANOTHER_SCALE["Z-Image"])
    assert pipe.seen == list("abcd")


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t"])
def test_the_timesteps_names(name):
    """HiDream calls it timesteps."""

    class Named(Small):
        def forward(self, sample, **kwargs):
            return super().forward(sample, kwargs[name])

    runtime = prepare(Named(), small_plan("ab"))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    runtime.follow(SimpleNamespace(unet=runtime.model, scheduler=scheduler))
    runtime.model(torch.zeros(1, 4, 8, 8), **{name: scheduler.timesteps[1]})
    assert runtime.level == "b"
    with pytest.raises(ScheduleError, match="called without a timestep"):
        runtime.model(torch.zeros(1, 4, 8, 8))


def test_a_scheduler_that_lists_the_end_as_a_timestep():
    runtime = prepare(Small(), small_plan("ab"))
    pipe = Stepping(runtime.model, SCMScheduler())
    runtime.follow(pipe)
    pipe(2, transform=lambda t: torch.sin(t) / (torch.cos(t) + torch.sin(t)))
    assert len(pipe.scheduler.timesteps) == 3 and pipe.seen == list("ab")


def test_a_prepared_model_is_not_calibrated():
    runtime = prepare(Small(), small_plan("ab"))
    with pytest.raises(CalibrationError, match="layer 'conv' is prepared for a precision per step; load the original"):
        calibrate(runtime.model, run=lambda: runtime.model(torch.zeros(1, 4, 8, 8), torch.tensor(3)))
    for plan in (Plan({}), small_plan("b").levels["b"]):
        with pytest.raises(PlanError, match="layer 'conv' is prepared for a precision per step"):
            quantize(runtime.model, mixdq_config(plan))


def test_wrong_levels_are_named_before_anything_changes(unet, calibration):
    runtime = prepare(Small(), small_plan("ab"))
    with pytest.raises(ScheduleError, match="level is 'z', the model was prepared for a, b, c, d"):
        runtime.level = "z"
    with pytest.raises(ScheduleError, match="level 'e': the model was prepared for"):
        runtime.plan = TemporalPlan({"e": None}, ("e",))
    with pytest.raises(QuantizationError, match="prepared for levels already"):
        prepare(runtime.model, small_plan("ab"))
    with pytest.raises(ScheduleError, match="not the model that was prepared"):
        runtime.follow(SimpleNamespace(unet=Small(), scheduler=DDIMScheduler()))
    model = Small()
    kinds = [type(m) for m in model.modules()]
    for levels, words in (
        ({"a": Plan({"conv": LayerPlan(weight_bits=8, act_bits=8)})}, "level 'a': layer 'conv': act_bits is 8"),
        ({"a": Plan({"nope": LayerPlan(weight_bits=8)})}, "level 'a': layer 'nope'"),
        ({"a": Plan({"proj": LayerPlan(act_bits=8, act_range=(-1.0, 1.0))})}, "no integer product"),
    ):
        with pytest.raises(PlanError, match=words):
            prepare(model, TemporalPlan(levels, ("a",)))
    halves = {n: Plan({"conv": LayerPlan(weight_bits=8, split=s)}) for n, s in (("a", 1), ("b", 2))}
    with pytest.raises(ScheduleError, match="layer 'conv': level 'b' has split 2, another level 1"):
        prepare(model, TemporalPlan(halves, ("a",)))
    signs = {n: Plan({"conv": LayerPlan(weight_bits=4, symmetric=s)}) for n, s in (("a", True), ("b", False))}
    with pytest.raises(ScheduleError, match="symmetric=False at 4 bits"):
        prepare(model, TemporalPlan(signs, ("a",)), storage="own")
    searched = {n: Plan({"conv": LayerPlan(weight_bits=4, weight_range=r)}) for n, r in (("a", "mse"), ("b", "minmax"))}
    for storage, words in (("own", "weight_range='minmax' at 4 bits"), ("nested", "weight_range='mse'.*storage='own'")):
        with pytest.raises(ScheduleError, match=words):
            prepare(model, TemporalPlan(searched, ("a",)), storage=storage)
    needing = Plan({"conv": LayerPlan(weight_bits=4, rounding="compensated")})
    with pytest.raises(ScheduleError, match="layer 'conv': level 'a' has rounding='compensated'.*expected 'nearest'"):
        prepare(model, TemporalPlan({"a": needing}, ("a",)), storage="own")
    with torch.no_grad():
        model.proj.weight[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match="layer 'proj': weight has 1 NaN"):
        prepare(model, small_plan("ab"))
    assert [type(m) for m in model.modules()] == kinds


def test_a_state_dict_moves_to_a_model_prepared_alike():
    torch.manual_seed(1)
    first, second = (prepare(Small(), small_plan("abcd")) for _ in range(2))
    second.model.load_state_dict(first.model.state_dict())
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(3)
    for level in "abcd":
        first.level = second.level = level
        assert torch.equal(first.model(x, t)[0], second.model(x, t)[0])
    twin = copy.deepcopy(first)
    twin.level = "a"
    assert first.level == "d" and twin.model.conv.switch is not first.model.conv.switch


def test_own_codes_are_those_of_quantize():
    """Their range as well: "mse" clips what min-max does not."""
    plain, levels = Small(), {"a": Plan({"conv": LayerPlan(weight_bits=2, weight_range="mse")})}
    runtime = prepare(copy.deepcopy(plain), TemporalPlan(levels, ("a",)), storage="own")
    quantize(plain, mixdq_config(levels["a"]))
    assert torch.equal(runtime.model.conv.weight, plain.conv.weight.dequantize())


@pytest.mark.parametrize("keep_full", [False, True])
def test_a_layer_says_the_type_it_computes_in(keep_full):
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    levels = {"full": None, "a": Plan({"0": LayerPlan(weight_bits=8)})}
    runtime = prepare(model, TemporalPlan(levels, ("a",)), keep_full=keep_full)
    assert model[0].weight.dtype == torch.bfloat16
    model.to(torch.float16)
    assert model[0].weight.dtype == torch.float16
    assert runtime.level == "a"
