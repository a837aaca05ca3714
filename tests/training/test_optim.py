"""The steps are torch.optim's on float32, bit for bit; what is not supported is refused before anything changes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torchao.optim.subclass_8bit import OptimState8bit

from mixdq_ao import MemoryEfficientAdamW, MemoryEfficientSGD, optim
from mixdq_ao.errors import OptimizerError
from mixdq_ao.training import base
from mixdq_ao.training.moments import dither_of, dithered
from mixdq_ao.training.split import split

from .models import BF16, FP16, awkward, batches, give_gradients, same_bits, tied, wide


def holder(params: list[nn.Parameter]) -> nn.Module:
    return nn.ParameterList(params)


def matches(ours: Any, model: nn.Module, reference: nn.Module) -> bool:
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return all(same_bits(ours.fp32(p), q) for p, q in pairs)


def snapshot(optimizer: Any) -> list[torch.Tensor]:
    """Everything an optimizer and its parameters hold, as bytes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = [v for p in params for v in optimizer.state.get(p, {}).values()]
    plain = [v.codes if isinstance(v, OptimState8bit) else v for v in held]
    return [t.detach().clone().contiguous().view(-1).view(torch.uint8) for t in [*params, *plain]]


def unchanged(before: list[torch.Tensor], optimizer: Any) -> bool:
    after = snapshot(optimizer)
    return len(before) == len(after) and all(map(torch.equal, before, after))


# --- the same bits ---


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (MemoryEfficientAdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
        (MemoryEfficientSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}),
    ],
)
def test_a_thousand_steps_are_torchs_bit_for_bit(ours, theirs, options):
    """With a learning-rate schedule, on values and gradients of every rounding case."""

    def chosen():
        return [awkward()[i] for i in (0, 3, 4)]

    model, reference = holder(chosen()), holder(chosen())
    mine = ours.from_fp32(model, **options)
    other = theirs(reference.parameters(), foreach=False, **options)
    plans = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 1000) for o in (mine, other)]
    for step in range(1000):
        give_gradients(model.parameters(), reference.parameters())
        for thing in (mine, other, *plans):
            thing.step()
        if step % 100 == 0 or step == 999:
            assert matches(mine, model, reference), step
            assert all(same_bits(p, split(mine.fp32(p), BF16)[0]) for p in model.parameters())
    moved = [(mine.fp32(p) != a).float().mean() for p, a in zip(model.parameters(), chosen(), strict=True)]
    assert min(moved[1:]) > 0.9


def test_large_tensors_step_part_by_part():
    model, reference = holder(awkward()[5:]), holder(awkward()[5:])
    mine = MemoryEfficientAdamW.from_fp32(model)
    other = torch.optim.AdamW(reference.parameters(), foreach=False)
    for _ in range(3):
        give_gradients(model.parameters(), reference.parameters())
        mine.step()
        other.step()
    assert matches(mine, model, reference)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (MemoryEfficientAdamW, torch.optim.AdamW, {"weight_decay": 0.0}),
        (MemoryEfficientAdamW, torch.optim.AdamW, {"betas": (0.3, 0.5), "eps": 0.0}),
        (MemoryEfficientAdamW, torch.optim.AdamW, {"betas": (0.5, 0.99), "lr": 3.0}),
        (MemoryEfficientAdamW, torch.optim.AdamW, {"betas": (0.0, 0.0), "weight_decay": 0.5}),
        (MemoryEfficientSGD, torch.optim.SGD, {}),
        (MemoryEfficientSGD, torch.optim.SGD, {"weight_decay": 0.1}),
        (MemoryEfficientSGD, torch.optim.SGD, {"momentum": 0.5, "dampening": 0.25}),
    ],
)
@pytest.mark.parametrize("foreach", [False, True])
def test_other_options_are_torchs_bit_for_bit(ours, theirs, options, foreach):
    """On a CPU foreach goes the same way. eps=0 with zero gradients makes NaN: here as there."""
    options = {"lr": 1e-2, **options}
    model, reference = holder(awkward()[:5]), holder(awkward()[:5])
    mine = ours.from_fp32(model, **options)
    other = theirs(reference.parameters(), foreach=foreach, **options)
    for _ in range(20):
        give_gradients(model.parameters(), reference.parameters())
        mine.step()
        other.step()
    assert matches(mine, model, reference)


def test_float32_parameters_step_as_they_are():
    params, reference = awkward(), awkward()
    mine, other = MemoryEfficientAdamW(params), torch.optim.AdamW(reference, foreach=False)
    for _ in range(20):
        give_gradients(params, reference)
        mine.step()
        other.step()
    assert all(map(same_bits, params, reference))
    assert set(mine.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_gradients_of_another_dtype_and_layout():
    """float32 gradients (``grad_dtype``) are used in full; a contiguous gradient of a channels-last weight is right."""
    weight = torch.randn(4, 3, 2, 2)
    p = nn.Parameter(weight.to(BF16).to(memory_format=torch.channels_last))
    p.grad_dtype = None
    q = nn.Parameter(p.detach().float())
    mine, other = MemoryEfficientAdamW([p]), torch.optim.AdamW([q], foreach=False)
    for _ in range(5):
        p.grad = torch.randn(4, 3, 2, 2)
        q.grad = p.grad.clone()
        mine.step()
        other.step()
    assert same_bits(mine.fp32(p), q)


def test_float16_is_exact_where_its_remainder_is():
    model, reference = [holder([nn.Parameter(torch.rand(500) + 0.5)]) for _ in range(2)]
    reference.load_state_dict(model.state_dict())
    mine = MemoryEfficientAdamW.from_fp32(model, FP16, lr=1e-4)
    other = torch.optim.AdamW(reference.parameters(), lr=1e-4, foreach=False)
    for _ in range(200):
        give_gradients(model.parameters(), reference.parameters(), FP16)
        mine.step()
        other.step()
    assert matches(mine, model, reference)


def test_float16_of_small_values_stays_within_its_steps():
    """Each step rounds once to a multiple of 2^-39, and weights this small make no other difference."""
    start, steps = torch.randn(2000) * 1e-5, 100
    model, reference = [holder([nn.Parameter(start.clone())]) for _ in range(2)]
    mine = MemoryEfficientAdamW.from_fp32(model, FP16, lr=1e-7)
    other = torch.optim.AdamW(reference.parameters(), lr=1e-7, foreach=False)
    for _ in range(steps):
        give_gradients(model.parameters(), reference.parameters(), FP16)
        mine.step()
        other.step()
    (p,), (q,) = model.parameters(), reference.parameters()
    assert (mine.fp32(p) - start).abs().median() > 3e-7
    off = (mine.fp32(p).double() - q.double()).abs().max()
    assert 0 < off <= steps * (2.0**-40 + 2.0**-24 * q.abs().max())


# --- memory ---


@pytest.mark.parametrize(("moments", "bytes_each"), [("float32", 12), ("bfloat16", 8), ("8bit", 6 + 8 / 256)])
def test_bytes_per_parameter(moments, bytes_each):
    p = nn.Parameter(torch.randn(256, 1024).to(BF16))
    optimizer = MemoryEfficientAdamW([p], moments=moments)
    p.grad = torch.randn_like(p)
    optimizer.step()
    state = optimizer.state[p]
    assert p.nbytes + state["bfloat16_remainder"].nbytes == 4 * p.numel()
    held = [v for k, v in state.items() if k != "step"]
    size = sum(v.codes.nbytes + v.scale.nbytes if isinstance(v, OptimState8bit) else v.nbytes for v in held)
    assert p.nbytes + size == bytes_each * p.numel()


def test_dithered_rounding_is_right_on_average():
    x = torch.full((1 << 16,), 1.0) + torch.rand(1) * 0.0078125  # somewhere between two neighbours
    for step in (1, 2, 1000):
        rounded = dithered(x, dither_of(step))
        assert set(rounded.tolist()) == {1.0, 1.0078125}
        assert abs(rounded.double().mean() - x[0].double()) < 0.0078125 / (1 << 15)
    one = torch.stack([dithered(x[:8], dither_of(step)) for step in range(1, 4001)]).double().mean(0)
    assert (one - x[0].double()).abs().max() < 0.0078125 * 0.01
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, 0.0])
    assert same_bits(dithered(odd, 0xFFFF)[[0, 1, 2, 4]], odd[[0, 1, 2, 4]].to(BF16))


def test_bfloat16_moments_decay_where_rounding_to_nearest_would_stand_still():
    p = nn.Parameter(torch.ones(4096, dtype=BF16))
    optimizer = MemoryEfficientAdamW([p], lr=1e-6, moments="bfloat16")
    for step in range(700):
        p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
        optimizer.step()
    second = optimizer.state[p]["exp_avg_sq"].double().mean()
    assert second == pytest.approx(1e-3 * 0.999**699, rel=0.01)
    stuck = torch.tensor(1e-3, dtype=BF16)
    assert (stuck * 0.999).to(BF16) == stuck


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_small_moments_train_as_well(moments):
    """On a quadratic with noise, to within a few tenths of what exact moments reach (blocks of 8 bits: 1.2 times)."""
    torch.manual_seed(0)
    target, ends = torch.randn(64, 64), {}
    for kind in ("float32", moments):
        torch.manual_seed(1)
        p = nn.Parameter(torch.zeros(64, 64, dtype=BF16))
        optimizer = MemoryEfficientAdamW([p], lr=0.04, weight_decay=0.0, moments=kind)
        for _ in range(120):
            p.grad = (optimizer.fp32(p) - target + 0.1 * torch.randn(64, 64)).to(BF16)
            optimizer.step()
        ends[kind] = (optimizer.fp32(p) - target).square().mean().item()
    assert ends[moments] < {"bfloat16": 1.05, "8bit": 1.3}[moments] * ends["float32"] < 0.01


def test_8bit_moments_are_torchaos_where_blocks_fit():
    big, small, odd = (nn.Parameter(torch.randn(n).to(BF16)) for n in (4096, 256, 4097))
    optimizer = MemoryEfficientAdamW([big, small, odd], moments="8bit")
    for p in (big, small, odd):
        p.grad = torch.randn_like(p)
    optimizer.step()
    kinds = [type(optimizer.state[p]["exp_avg"]) for p in (big, small, odd)]
    assert kinds == [OptimState8bit, torch.Tensor, torch.Tensor]
    first = optimizer.state[big]["exp_avg"].dequantize()
    assert (first - 0.1 * big.grad.float()).abs().max() < 0.02 * 0.1 * big.grad.abs().max()


# --- parameters that are special ---


def test_embeddings_tied_weights_and_frozen_parameters():
    model, reference = tied(), tied(torch.float32)
    reference.load_state_dict(model.state_dict())
    mine = MemoryEfficientAdamW(model.parameters(), lr=1e-2)
    other = torch.optim.AdamW(reference.parameters(), lr=1e-2, foreach=False)
    frozen = model.frozen.weight.detach().clone()
    for words in batches(5):
        model.loss(words).backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        mine.step()
        other.step()
        mine.zero_grad()
    assert matches(mine, model, reference)
    assert torch.equal(frozen, model.frozen.weight) and model.frozen.weight not in mine.state
    assert torch.equal(mine.fp32(model.frozen.weight), frozen.float())


def test_sparse_gradients_are_refused_by_name():
    model = nn.ModuleDict({"words": nn.Embedding(5, 4, sparse=True), "out": nn.Linear(4, 4)}).to(BF16)
    optimizer = MemoryEfficientAdamW(model.named_parameters())
    model["out"](model["words"](torch.tensor([1, 2]))).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(OptimizerError, match=r"words\.weight: the gradient is sparse_coo.*sparse=False"):
        optimizer.step()
    assert unchanged(before, optimizer)


def test_a_parameter_someone_else_writes_has_the_written_value():
    model = holder([nn.Parameter(torch.randn(100))])
    (p,) = model.parameters()
    optimizer = MemoryEfficientAdamW.from_fp32(model)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert not torch.equal(optimizer.fp32(p), p.float())
    with torch.no_grad():
        p.clamp_(-0.5, 0.5)
    assert torch.equal(optimizer.fp32(p), p.float())
    reference = nn.Parameter(p.detach().float())
    other = torch.optim.AdamW([reference], foreach=False)
    other.load_state_dict({**other.state_dict(), "state": {0: torch_state(optimizer, p)}})
    give_gradients([p], [reference])
    optimizer.step()
    other.step()
    assert same_bits(optimizer.fp32(p), reference)
    p.data.zero_()  # not seen: what stays is less than the visible value's own step, and no NaN
    assert optimizer.fp32(p).abs().max() < 1e-40


def torch_state(optimizer: Any, p: nn.Parameter) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in optimizer.state[p].items() if "remainder" not in k}


def test_memory_format_may_change_between_steps():
    start = torch.randn(4, 3, 2, 2)
    model, reference = [holder([nn.Parameter(start.clone())]) for _ in range(2)]
    mine = MemoryEfficientAdamW.from_fp32(model)
    other = torch.optim.AdamW(reference.parameters(), foreach=False)
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        model.to(memory_format=layout)
        for _ in range(3):
            give_gradients(model.parameters(), reference.parameters())
            mine.step()
            other.step()
        assert matches(mine, model, reference)


# --- exact values in and out ---


def test_from_fp32_keeps_every_bit():
    model = holder(awkward())
    optimizer = MemoryEfficientAdamW.from_fp32(model)
    assert all(p.dtype is BF16 for p in model.parameters())
    assert all(same_bits(optimizer.fp32(p), q) for p, q in zip(model.parameters(), awkward(), strict=True))
    shared = tied(torch.float32)
    shared.head = shared.embed
    optimizer = MemoryEfficientAdamW.from_fp32(shared)
    assert shared.head.weight is shared.embed.weight and shared.frozen.weight.dtype is BF16


def test_set_fp32_and_fp32_go_together():
    p = nn.Parameter(torch.zeros(3, 5, dtype=BF16))
    optimizer = MemoryEfficientAdamW([p])
    assert torch.equal(optimizer.fp32(p), torch.zeros(3, 5)) and p not in optimizer.state
    value = torch.randn(5, 3).T
    optimizer.set_fp32(p, value)
    assert same_bits(optimizer.fp32(p), value.contiguous())
    for wrong in (torch.zeros(5, 3), torch.zeros(3, 5, dtype=BF16)):
        with pytest.raises(OptimizerError, match="set_fp32 with"):
            optimizer.set_fp32(p, wrong)
    assert same_bits(optimizer.fp32(p), value.contiguous())
    for call in (lambda: optimizer.fp32(torch.zeros(3)), lambda: optimizer.set_fp32(torch.zeros(3), torch.zeros(3))):
        with pytest.raises(OptimizerError, match="not a parameter of this optimizer"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore', expected one of raise, skip, propagate"),
    ],
)
def test_from_fp32_refuses_before_the_model_changes(options, message):
    model = tied(torch.float32)
    with pytest.raises(OptimizerError, match=message):
        MemoryEfficientAdamW.from_fp32(model, **options)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_float16_takes_no_value_beyond_its_range():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = 65520.0
    with pytest.raises(OptimizerError, match="weight: has values of 65520 or more"):
        MemoryEfficientAdamW.from_fp32(model, FP16)
    assert model.weight.dtype is model.bias.dtype is torch.float32
    p = nn.Parameter(torch.zeros(2, dtype=FP16))
    optimizer = MemoryEfficientAdamW([p])
    with pytest.raises(OptimizerError, match="set_fp32 with values of 65520 or more"):
        optimizer.set_fp32(p, torch.tensor([1.0, -1e30]))
    assert p.tolist() == [0.0, 0.0]
    assert MemoryEfficientAdamW.from_fp32(model).fp32(model.weight)[0, 0] == 65520.0


# --- bad options ---


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MemoryEfficientAdamW, {"lr": float("nan")}, "group 0: lr is nan, expected a number from 0 up"),
        (MemoryEfficientAdamW, {"lr": "fast"}, "lr is 'fast'"),
        (MemoryEfficientAdamW, {"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0, expected a number from 0 up and below 1"),
        (MemoryEfficientAdamW, {"betas": 0.9}, "betas is 0.9, expected two numbers"),
        (MemoryEfficientAdamW, {"eps": -1e-8}, "eps is -1e-08"),
        (MemoryEfficientAdamW, {"weight_decay": float("inf")}, "weight_decay is inf"),
        (MemoryEfficientAdamW, {"moments": "4bit"}, "moments is '4bit', expected one of float32, bfloat16, 8bit"),
        (MemoryEfficientAdamW, {"nonfinite": "stop"}, "nonfinite is 'stop'"),
        (MemoryEfficientSGD, {"momentum": -0.1}, "momentum is -0.1"),
        (MemoryEfficientSGD, {"nesterov": True}, "nesterov needs a momentum"),
    ],
)
def test_options_out_of_range(kind, options, message):
    with pytest.raises(OptimizerError, match=message):
        kind([nn.Parameter(torch.zeros(2, dtype=BF16))], **options)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.float64), "torch.float64, expected torch.bfloat16, torch.float16 or torch.float32"),
        (torch.zeros(2, dtype=torch.complex64), "weird is torch.complex64"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "weird is torch.float8_e4m3fn"),
        (torch.zeros(4, 4, dtype=BF16)[:, ::2], "weird does not fill its memory"),
    ],
)
def test_unsupported_parameters_are_named_and_not_added(tensor, message):
    optimizer = MemoryEfficientAdamW([("fine", nn.Parameter(torch.zeros(2, dtype=BF16)))])
    with pytest.raises(OptimizerError, match=message):
        optimizer.add_param_group({"params": [("weird", nn.Parameter(tensor))]})
    with pytest.raises(OptimizerError, match="group 1: lr is -1"):
        optimizer.add_param_group({"params": [("other", nn.Parameter(torch.zeros(2, dtype=BF16)))], "lr": -1})
    assert len(optimizer.param_groups) == 1


# --- NaN ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_gradients_are_raised_or_skipped_and_counted(value):
    model = nn.Linear(5, 4).to(BF16)

    def step(policy: str) -> Any:
        optimizer = MemoryEfficientAdamW(model.named_parameters(), nonfinite=policy)
        for bad in (False, True):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            if bad:
                model.bias.grad[2] = value
                before = snapshot(optimizer)
                try:
                    optimizer.step()
                finally:
                    assert unchanged(before, optimizer) is (policy != "propagate")
            else:
                optimizer.step()
        return optimizer

    with pytest.raises(OptimizerError, match="bias: NaN or infinite values in the gradient; no parameter was changed"):
        step("raise")
    optimizer = step("skip")
    assert optimizer.skipped == 1 and optimizer.state[model.weight]["step"] == 1
    optimizer = step("propagate")
    assert optimizer.skipped == 0 and optimizer.fp32(model.bias)[2].isnan()
    assert model.bias.isnan().sum() == 1


def test_grad_scaler_scales_skips_and_comes_back():
    """torch.amp.GradScaler with float16 parameters: the step unscales in float32, overflows are skipped."""
    model, plain = [nn.Linear(8, 4).to(FP16) for _ in range(2)]
    plain.load_state_dict(model.state_dict())
    mine, other = (MemoryEfficientAdamW(m.parameters(), lr=1e-2) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        x = torch.randn(3, 8).to(FP16)
        for m, o in ((model, mine), (plain, other)):
            o.zero_grad()
            loss = m(x).float().square().mean()
            (scaler.scale(loss) if o is mine else loss).backward()
        if step == 2:
            model.weight.grad[0, 0] = float("inf")
        if step == 2:
            before = snapshot(mine)
            scaler.step(mine)
            assert unchanged(before, mine)
        else:
            scaler.step(mine), other.step()
        scaler.update()
    assert mine.skipped == 1 and scaler.get_scale() == 2.0**7
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.fp32(p) - other.fp32(q)).abs().max() < 1e-3  # float16 rounds scaled gradients elsewhere
        assert mine.state[p]["step"] == 3


# --- checkpoints ---


def trained(steps: int, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = tied(torch.float32)
    optimizer = MemoryEfficientAdamW.from_fp32(model, **{"lr": 1e-2, **options})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, schedule, batches(steps))
    return model, optimizer, schedule


def train(model: Any, optimizer: Any, schedule: Any, words: list[torch.Tensor]) -> None:
    for batch in words:
        model.loss(batch).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("model_first", [True, False])
def test_resumed_training_is_the_same_to_the_bit(tmp_path, moments, model_first):
    model, optimizer, schedule = trained(4, moments=moments)
    things = {"model": model, "optimizer": optimizer, "schedule": schedule}
    torch.save({k: v.state_dict() for k, v in things.items()}, tmp_path / "at.pt")
    train(model, optimizer, schedule, batches(9)[4:])

    saved = torch.load(tmp_path / "at.pt", weights_only=True)
    again, fresh, plan = trained(1, moments=moments, lr=0.5)
    order = [(again, "model"), (fresh, "optimizer")]
    for thing, key in order if model_first else order[::-1]:
        thing.load_state_dict(saved[key])
    plan.load_state_dict(saved["schedule"])
    train(again, fresh, plan, batches(9)[4:])
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert same_bits(optimizer.fp32(p), fresh.fp32(q)) and same_bits(p, q)


def test_8bit_states_resume_to_the_bit(tmp_path):
    """Large enough for blocks, unlike the model above."""

    def run(steps: range, load: bool) -> tuple[nn.Parameter, Any]:
        p = nn.Parameter(torch.linspace(-1, 1, 8192).to(BF16))
        optimizer = MemoryEfficientAdamW([p], moments="8bit")
        if load:
            saved = torch.load(tmp_path / "8.pt", weights_only=True)
            optimizer.load_state_dict(saved["optimizer"])
            p.data.copy_(saved["p"])
        for step in steps:
            p.grad = torch.randn(8192, generator=torch.Generator().manual_seed(step)).to(BF16)
            optimizer.step()
            if step == 2:
                torch.save({"optimizer": optimizer.state_dict(), "p": p.detach()}, tmp_path / "8.pt")
        return p, optimizer

    p, one = run(range(6), load=False)
    q, two = run(range(3, 6), load=True)
    assert same_bits(one.fp32(p), two.fp32(q)) and isinstance(two.state[q]["exp_avg"], OptimState8bit)


def test_loading_does_not_share_memory_or_cast():
    model, optimizer, _ = trained(2)
    saved = optimizer.state_dict()
    other = MemoryEfficientAdamW(model.parameters())
    other.load_state_dict(saved)
    p = model.embed.weight
    assert other.state[p]["exp_avg"].dtype is torch.float32
    assert other.state[p]["bfloat16_remainder"].dtype is torch.int16
    assert other.state[p]["exp_avg"].data_ptr() != optimizer.state[p]["exp_avg"].data_ptr()


def test_the_users_own_load_hooks_run_first():
    model, optimizer, _ = trained(1)
    saved = optimizer.state_dict()
    renamed = {**saved, "state": {k: {"old_" + n: v for n, v in s.items()} for k, s in saved["state"].items()}}
    optimizer.register_load_state_dict_pre_hook(
        lambda _, d: {**d, "state": {k: {n[4:]: v for n, v in s.items()} for k, s in d["state"].items()}}
    )
    optimizer.load_state_dict(renamed)
    assert optimizer.state[model.embed.weight]["step"] == 1


def change(saved: dict[str, Any], key: str, value: Any) -> None:
    saved["state"][0][key] = value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: change(s, "exp_avg", torch.zeros(3, 3)),
            r"exp_avg: \[3, 3\] of float32 in the checkpoint, expected",
        ),
        (lambda s: change(s, "exp_avg", s["state"][0]["exp_avg"].to(BF16)), "of bfloat16 in the checkpoint"),
        (lambda s: change(s, "exp_avg", 3.0), "exp_avg: float in the checkpoint"),
        (lambda s: change(s, "step", torch.tensor(-1.0)), "step is -1.0 in the checkpoint"),
        (lambda s: change(s, "step", torch.tensor(float("nan"))), "step is nan in the checkpoint"),
        (lambda s: change(s, "extra", torch.zeros(1)), "the checkpoint holds bfloat16_remainder, exp_avg.*extra"),
        (lambda s: s["state"][0].pop("bfloat16_remainder"), "expected bfloat16_remainder, exp_avg"),
        (lambda s: s["state"].update({0: [1]}), "state is a list"),
        (lambda s: s["state"].update({99: {}}), r"parameters that are in no group: \[99\]"),
        (lambda s: s["param_groups"][0]["params"].pop(), "groups of .* parameters, this optimizer of"),
        (lambda s: s["param_groups"][0].pop("moments"), r"param_groups\[0\].*lacks moments"),
        (lambda s: s["param_groups"][0].update(lr=-1), r"param_groups\[0\] of the checkpoint: lr is -1"),
        (lambda s: s["param_groups"][0].update(moments="8bit", betas=None), "betas is None"),
        (lambda s: s.pop("state"), "not an optimizer's state dict"),
        (lambda s: s.update(param_groups=3), "param_groups are not a list"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_overwritten(edit, message):
    model, optimizer, _ = trained(2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] += 1  # so that a partial load would show
    edit(saved)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_state_dict(saved)
    assert unchanged(before, optimizer) and str(groups) == str(optimizer.param_groups)


def test_checkpoints_of_other_dtypes_and_optimizers_are_refused():
    """A float16 remainder means something else than a bfloat16 one: it never passes for it."""
    one = {dtype: nn.Parameter(torch.randn(6).to(dtype)) for dtype in (BF16, FP16)}
    mine = {dtype: MemoryEfficientAdamW([p]) for dtype, p in one.items()}
    for dtype, p in one.items():
        p.grad = torch.ones_like(p)
        mine[dtype].step()
    with pytest.raises(OptimizerError, match="holds exp_avg, exp_avg_sq, float16_remainder, step, expected bfloat16"):
        mine[BF16].load_state_dict(mine[FP16].state_dict())
    theirs = torch.optim.AdamW([one[BF16]])
    with pytest.raises(OptimizerError, match="lacks moments; was it saved by another kind of optimizer"):
        mine[BF16].load_state_dict(theirs.state_dict())
    with pytest.raises(OptimizerError, match="lacks dampening, momentum, nesterov"):
        MemoryEfficientSGD([one[BF16]]).load_state_dict(mine[BF16].state_dict())


def test_copies_and_pickles_go_on_alike():
    model, optimizer, _ = trained(2)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    words = batches(3)[2]
    for m, o in [(model, optimizer), *twins]:
        m.loss(words).backward()
        o.step()
    for m, o in twins:
        pairs = zip(model.parameters(), m.parameters(), strict=True)
        assert all(same_bits(optimizer.fp32(p), o.fp32(q)) for p, q in pairs)


def saved_and_loaded(p: nn.Parameter, optimizer: Any) -> tuple[nn.Parameter, Any]:
    q = nn.Parameter(p.detach().clone())
    fresh = MemoryEfficientAdamW([q], lr=0.5)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return q, fresh


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "again",
    [
        saved_and_loaded,
        lambda *both: copy.deepcopy(both),
        lambda *both: copy.deepcopy(both[::-1])[::-1],
        lambda *both: pickle.loads(pickle.dumps(both)),
    ],
    ids=["state_dict", "copy", "copy, optimizer first", "pickle"],
)
def test_what_was_written_stays_written_in_checkpoints_copies_and_pickles(again, dtype):
    """The remainder that a write makes stale is in none of them."""

    def write_after_step(p: nn.Parameter, optimizer: Any, step: int) -> None:
        p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
        with torch.no_grad():
            p.clamp_(-0.5, 0.5)

    p = nn.Parameter(torch.linspace(-1, 1, 1000).to(dtype))
    optimizer = MemoryEfficientAdamW([p], lr=1e-3)
    for step in range(3):
        write_after_step(p, optimizer, step)
    q, other = again(p, optimizer)
    assert torch.equal(optimizer.fp32(p), p.float()) and torch.equal(other.fp32(q), p.float())
    for step in range(3, 6):
        write_after_step(p, optimizer, step)
        write_after_step(q, other, step)
    p.grad = q.grad = torch.ones_like(p)
    optimizer.step()
    other.step()
    assert same_bits(optimizer.fp32(p), other.fp32(q)) and not torch.equal(optimizer.fp32(p), p.float())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_sees_writes_before_its_first_step(again):
    p = nn.Parameter(torch.linspace(-1, 1, 100).to(BF16))
    optimizer = MemoryEfficientAdamW([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    optimizer.step()
    q, other = again((p, optimizer))
    assert same_bits(other.fp32(q), optimizer.fp32(p)) and not torch.equal(other.fp32(q), q.float())
    with torch.no_grad():
        q.clamp_(-0.5, 0.5)
    assert torch.equal(other.fp32(q), q.float()) and not torch.equal(optimizer.fp32(p), p.float())


@pytest.mark.parametrize("attached", [False, True])
def test_writes_are_seen_again_after_one_step_behind_a_checkpoint(attached):
    """Also to a parameter that had no gradient in that step."""
    model = holder([nn.Parameter(torch.linspace(-1, 1, 100).to(BF16)) for _ in range(2)])
    p, q = model.parameters()
    optimizer = MemoryEfficientAdamW([p, q], lr=1e-3)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    if attached:
        optimizer.attach(model)
    optimizer.zero_grad()
    (p.float() ** 2).sum().backward()
    exact = optimizer.fp32(q)
    with torch.no_grad():
        q.copy_(q.clone())  # loading the model
    assert same_bits(optimizer.fp32(q), exact) and not torch.equal(exact, q.float())
    optimizer.step()
    assert same_bits(optimizer.fp32(q), exact)
    with torch.no_grad():
        q.fill_(2.0)
    assert torch.equal(optimizer.fp32(q), q.float())
    assert not torch.equal(optimizer.fp32(p), p.float())


def test_asking_for_the_state_changes_nothing_that_was_not_written():
    model, optimizer, _ = trained(2)
    before = snapshot(optimizer)
    optimizer.state_dict()
    assert unchanged(before, optimizer)
    p = model.embed.weight
    optimizer.register_state_dict_pre_hook(lambda _: p.detach().mul_(0.5))
    state = optimizer.state_dict()["state"]
    index = [q is p for q in optimizer.param_groups[0]["params"]].index(True)
    assert not state[index]["bfloat16_remainder"].any() and torch.equal(optimizer.fp32(p), p.float())


def test_looking_at_a_state_before_the_first_step_changes_no_checkpoint():
    """``optimizer.state`` makes an empty one then, as torch's does."""
    p = nn.Parameter(torch.ones(3, dtype=BF16))
    optimizer = MemoryEfficientAdamW([p])
    assert optimizer.state[p] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_closure_and_added_groups():
    model = tied()
    optimizer = MemoryEfficientAdamW(model.embed.parameters(), lr=1e-2)
    optimizer.add_param_group({"params": model.block.parameters(), "moments": "bfloat16", "lr": 1e-3})

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.loss(batches(1)[0])
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0] and math.isfinite(losses[-1])
    kinds = {p.shape: optimizer.state[p]["exp_avg"].dtype for p in (model.embed.weight, model.block[0].weight)}
    assert list(kinds.values()) == [torch.float32, BF16]


# --- small tensors stepped as one ---


def small_ones() -> list[nn.Parameter]:
    """Many small parameters of odd shapes and layouts, some large, values of every rounding case."""
    torch.manual_seed(4)
    sizes = [1, 2, 3, 7, 15, 16, 17, 31, 63, 65, 100, 255, 1000, 1025, 4095, 4096, 4097, 300, 9, 33]
    flats = [torch.randn(n) * 10.0 ** torch.randint(-9, 3, (n,)) for n in sizes]
    images = [torch.randn(3, 5, 2, 2).to(memory_format=torch.channels_last) for _ in range(3)]
    many = [torch.randn(3000) for _ in range(30)]  # more than one lot
    return [*awkward()[:4], *(nn.Parameter(t) for t in [torch.empty(0), *flats, *images, *many])]


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (MemoryEfficientAdamW, torch.optim.AdamW, {"lr": 1e-2}),
        (MemoryEfficientSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
        (MemoryEfficientSGD, torch.optim.SGD, {"lr": 1e-2}),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_small_tensors_are_stepped_as_one_and_torchs_bit_for_bit(ours, theirs, options, dtype, monkeypatch):
    """Of two groups, with gradients that are missing or of another layout, some parameters written by others."""
    calls = []
    whole = base.update_together
    monkeypatch.setattr(base, "update_together", lambda *a, **k: calls.append(len(a[1])) or whole(*a, **k))
    model, reference = holder(small_ones()), holder(small_ones())
    mine = ours.from_fp32(model, **options) if dtype is BF16 else ours(model.parameters(), **options)
    other = theirs(reference.parameters(), foreach=False, **options)
    for step in range(12):
        give_gradients(model.parameters(), reference.parameters(), BF16)
        for i, (p, q) in enumerate(zip(model.parameters(), reference.parameters(), strict=True)):
            if step < i % 3:
                p.grad = q.grad = None  # so that some are steps behind
            elif p.dim() == 4:
                p.grad, q.grad = (None if x.grad is None else x.grad.contiguous() for x in (p, q))
        if step == 5:
            with torch.no_grad():
                for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                    q.copy_(p.clamp_(-0.3, 0.3).float())
        mine.step()
        other.step()
    assert matches(mine, model, reference)
    assert len(calls) >= 12 and max(calls) > 15
    if ours is MemoryEfficientAdamW:
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert all(same_bits(mine.state[p][name], other.state[q][name]) for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_moments_of_fewer_bits_do_not_depend_on_what_else_is_stepped(moments):
    """One optimizer for all, against one for each."""
    together, apart = small_ones(), small_ones()
    for p in [*together, *apart]:
        p.data = p.data.to(BF16)
    optimizers = [MemoryEfficientAdamW([p], moments=moments) for p in apart]
    whole = MemoryEfficientAdamW(together, moments=moments)
    for _ in range(4):
        for p, q in zip(together, apart, strict=True):
            p.grad, q.grad = (torch.empty_like(p).copy_(g) for g in [wide(p.shape)] * 2)
        for optimizer in [whole, *optimizers]:
            optimizer.step()
    assert all(same_bits(whole.fp32(p), o.fp32(q)) for p, q, o in zip(together, apart, optimizers, strict=True))


def test_gradients_whose_norm_overflows_are_finite():
    p, q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = MemoryEfficientAdamW([p, q])
    p.grad, q.grad = torch.full((3,), 3e38), torch.ones(3)
    optimizer.step()
    assert (q < 0).all() and optimizer.state[p]["step"] == 1 and optimizer.skipped == 0


def test_the_short_module_has_the_same_classes():
    assert optim.MemoryEfficientAdamW is MemoryEfficientAdamW and optim.MemoryEfficientSGD is MemoryEfficientSGD
    assert set(optim.__all__) <= set(dir(optim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_momentum_may_begin_and_end_while_training(dtype):
    """As torch's SGD on float32 parameters; what was saved without momentum loads with it."""
    start = torch.randn(300).to(dtype)
    p, reference = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours, theirs = MemoryEfficientSGD([p], lr=0.1), torch.optim.SGD([reference], lr=0.1, foreach=False)
    for momentum in (0.0, 0.0, 0.9, 0.9, 0.0, 0.9):
        gradient = torch.randn(300).to(dtype)
        for optimizer, q in ((ours, p), (theirs, reference)):
            optimizer.param_groups[0]["momentum"] = momentum
            q.grad = gradient.to(q.dtype)
            optimizer.step()
        assert torch.equal(ours.fp32(p), reference)
        ours.load_state_dict(ours.state_dict())
    damped = MemoryEfficientSGD([p], lr=0.1, dampening=0.5)
    damped.step()
    damped.param_groups[0]["momentum"] = 0.9
    with pytest.raises(OptimizerError, match="momentum begins after its first step, expected dampening=0"):
        damped.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_momentum_that_begins_may_be_saved_before_a_parameter_has_it(dtype):
    """Like torch's: the buffer is made at the parameter's next step, here in a run that was resumed."""
    starts = [torch.randn(300).to(dtype) for _ in range(2)]
    ours, theirs = [nn.Parameter(s.clone()) for s in starts], [nn.Parameter(s.float()) for s in starts]
    mine, other = MemoryEfficientSGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1, foreach=False)
    for step in range(4):
        for optimizer in (mine, other):
            optimizer.param_groups[0]["momentum"] = 0.9 if step else 0.0
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if step == 1 and i == 1 else torch.randn(300).to(dtype)
            q.grad = None if p.grad is None else p.grad.float()
        mine.step(), other.step()
        saved, mine = mine.state_dict(), MemoryEfficientSGD(ours, lr=0.5, momentum=0.5)
        mine.load_state_dict(saved)
    assert all(same_bits(mine.fp32(p), q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [4096, 100])
@pytest.mark.parametrize("before", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("after", ["float32", "bfloat16", "8bit"])
def test_moments_may_be_stored_in_another_way_later(before, after, size):
    """From a parameter's next step on; what they hold goes along, and the state loads at any time."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, size).to(BF16)) for _ in range(2))
    optimizer = MemoryEfficientAdamW([p, q], moments=before)
    p.grad, q.grad = torch.full_like(p, 2.0), torch.full_like(q, 2.0)
    optimizer.step()
    optimizer.param_groups[0]["moments"] = after
    p.grad, q.grad = torch.full_like(p, 2.0), None
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    fresh = MemoryEfficientAdamW([nn.Parameter(p.detach().clone())], moments=after)
    fresh.param_groups[0]["params"][0].grad = p.grad
    fresh.step()
    (like,), names = fresh.state.values(), ("exp_avg", "exp_avg_sq")
    for name, value in zip(names, (2 * (1 - 0.9**2), 4 * (1 - 0.999**2)), strict=True):
        held = optimizer.state[p][name]
        assert type(held) is type(like[name]) and held.dtype is like[name].dtype
        held = held.dequantize() if isinstance(held, OptimState8bit) else held
        assert held.float().mean().item() == pytest.approx(value, rel=2e-2)
    q.grad = torch.full_like(q, 2.0)
    optimizer.step()
    assert type(optimizer.state[q]["exp_avg"]) is type(like["exp_avg"])


@pytest.mark.parametrize("later", [torch.float16, torch.float32, torch.bfloat16])
def test_a_model_may_change_its_type(later):
    """What it holds then is the value; its state loads again."""
    model = nn.Linear(8, 8).to(torch.bfloat16)
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-2)
    for dtype in (torch.bfloat16, later):
        model.to(dtype)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        before = [p.detach().float() for p in model.parameters()]
        if dtype is not torch.bfloat16:
            assert all(map(torch.equal, map(optimizer.fp32, model.parameters()), before))
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    for p, value in zip(model.parameters(), before, strict=True):
        assert (optimizer.fp32(p) - value).abs().max() < 0.05
        assert sum(name.endswith("_remainder") for name in optimizer.state[p]) == (later != torch.float32)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("option", [{"maximize": True}, {"amsgrad": True}, {"nonfinite": "skip"}, {"compile": True}])
def test_options_of_a_group_that_would_be_ignored(option):
    (name,) = option
    with pytest.raises(OptimizerError, match=f"group 0: {name} is"):
        MemoryEfficientAdamW([{"params": [nn.Parameter(torch.zeros(3))], **option}])
