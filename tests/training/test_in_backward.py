"""Steps inside backward: the same as steps after it, with every gradient freed at once; what cannot be is refused."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixdq_ao import MemoryEfficientAdamW, MemoryEfficientSGD
from mixdq_ao.errors import OptimizerError
from mixdq_ao.training.loss_scale import LossScale

from .models import BF16, FP16, Tied, batches, same_bits, tied


def pair(kind: Any = MemoryEfficientAdamW, **options: Any) -> tuple[tuple[Tied, Any], tuple[Tied, Any]]:
    """Two equal models in bfloat16, each with its optimizer."""
    models = tied(), tied()
    return tuple((m, kind(m.named_parameters(), lr=1e-2, **options)) for m in models)  # type: ignore[return-value]


def alike(a: tuple[Tied, Any], b: tuple[Tied, Any]) -> bool:
    pairs = zip(a[0].parameters(), b[0].parameters(), strict=True)
    return all(same_bits(a[1].fp32(p), b[1].fp32(q)) for p, q in pairs)


def after_backward(model: Tied, optimizer: Any, words: Tensor) -> None:
    optimizer.zero_grad()
    model.loss(words).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MemoryEfficientAdamW, {}),
        (MemoryEfficientAdamW, {"moments": "bfloat16"}),
        (MemoryEfficientSGD, {"momentum": 0.9}),
    ],
)
def test_steps_are_those_after_backward(kind, options):
    """With tied weights, a block used twice, a frozen layer, rows never read, a schedule of learning rates."""
    one, two = pair(kind, **options)
    two[1].attach(two[0])
    plans = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for _, o in (one, two)]
    for words in batches(10):
        after_backward(*one, words)
        two[0].loss(words).backward()
        assert all(p.grad is None for p in two[0].parameters())
        two[1].step()
        for plan in plans:
            plan.step()
    assert alike(one, two)
    assert two[1].state[two[0].embed.weight]["step"] == 10 and two[0].frozen.weight not in two[1].state


def test_gradients_are_never_all_alive():
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8))).to(BF16)
    optimizer = MemoryEfficientAdamW(model.parameters())
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(p: Tensor) -> None:
        nonlocal most
        assert p.grad is not None
        alive.append(weakref.ref(p.grad))
        most = max(most, sum(r() is not None for r in alive))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)  # before ours, so it sees the gradient
    optimizer.attach(model)
    gc.collect()
    model(torch.randn(4, 32, dtype=BF16)).sum().backward()
    assert len(alive) == 8 and most == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Where a block is used twice, reentrant checkpoints make two gradients of it: refused. Else the same steps."""
    one, two = pair()
    two[1].attach(two[0])
    two[0].checkpoint = reentrant
    if reentrant:
        with pytest.raises(OptimizerError, match=r"block\..*: a second gradient before step\(\).*use_reentrant=False"):
            two[0].loss(batches(1)[0]).backward()
        return
    for words in batches(3):
        after_backward(*one, words)
        two[0].loss(words).backward()
        two[1].step()
    assert alike(one, two)


def test_accumulated_gradients_are_those_after_backward():
    one, two = pair()
    handle = two[1].attach(two[0])
    for words in batches(3):
        one[1].zero_grad()
        for half in words.split(2):
            one[0].loss(half).backward()
        one[1].step()
        with handle.accumulating():
            two[0].loss(words[:2]).backward()
        assert two[0].embed.weight.grad is not None
        two[0].loss(words[2:]).backward()
        assert two[0].embed.weight.grad is None
        two[1].step()
    assert alike(one, two)


def test_accumulating_without_saying_so_is_refused():
    model, optimizer = pair()[0]
    optimizer.attach(model)
    first, second = batches(2)
    model.loss(first).backward()
    with pytest.raises(OptimizerError, match=r"a second gradient before step\(\), after the first was used"):
        model.loss(second).backward()
    optimizer.zero_grad()
    model.loss(second).backward()  # a new pass
    optimizer.step()


def test_what_only_earlier_passes_reached_is_stepped_at_the_end():
    """A parameter without a gradient in the last pass of an accumulation, and one unfrozen after attach."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).to(BF16)
    layers[2].requires_grad_(False)
    optimizer = MemoryEfficientAdamW(layers.parameters())
    handle = optimizer.attach(layers)
    layers[2].requires_grad_(True)
    x = torch.ones(1, 4, dtype=BF16)
    with handle.accumulating():
        layers[0](x).sum().backward()
    (layers[1](x) + layers[2](x)).sum().backward()
    assert [layer.weight.grad is None for layer in layers] == [False, True, False]
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 and p.grad is None for p in layers.parameters())


def test_groups_may_change_after_attach():
    """Loading replaces the groups, a scheduler writes into them, a group is added: steps follow."""
    layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2)).to(BF16)
    saved = MemoryEfficientSGD(layers[0].parameters(), lr=0.25).state_dict()
    optimizer = MemoryEfficientSGD(layers[0].parameters(), lr=1.0)
    optimizer.attach(layers)
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": layers[1].parameters(), "lr": 0.5})
    before = [optimizer.fp32(layer.weight) for layer in layers]
    x = torch.ones(1, 4, dtype=BF16)
    for lr in (0.25, 0.125):
        optimizer.param_groups[0]["lr"] = lr
        (layers[0](x) + layers[1](x)).sum().backward()
        optimizer.step()
    moved = [b - optimizer.fp32(layer.weight) for b, layer in zip(before, layers, strict=True)]
    assert [m.mean().item() for m in moved] == pytest.approx([0.375, 1.0], abs=1e-6)


def test_two_optimizers_on_one_parameter_are_refused():
    model, first = pair()[0]
    first.attach(model)
    MemoryEfficientAdamW(model.parameters()).attach(model)
    with pytest.raises(OptimizerError, match="is a second optimizer attached to it"):
        model.loss(batches(1)[0]).backward()


def test_remove_brings_back_steps_after_backward():
    one, two = pair()
    handle = two[1].attach(two[0])
    with pytest.raises(OptimizerError, match="attached already"):
        two[1].attach(two[0])
    handle.remove()
    for words in batches(2):
        after_backward(*one, words)
        after_backward(*two, words)
    assert alike(one, two)


def test_remove_of_an_old_handle_leaves_the_new_one():
    one, two = pair()
    handle = two[1].attach(two[0])
    handle.remove()
    again = two[1].attach(two[0])
    handle.remove()
    for words in batches(3):
        after_backward(*one, words)
        two[0].loss(words).backward()
        assert all(p.grad is None for p in two[0].parameters())
        two[1].step()
    assert alike(one, two)
    again.remove()
    two[1].attach(two[0])


def test_writing_a_weight_that_backward_still_needs_is_an_error_not_a_wrong_gradient():
    """The weight is read a second time without a gradient of its own, by a part of the graph that comes later."""
    a, b = (nn.Parameter(torch.randn(4, 4).to(BF16)) for _ in range(2))
    model = nn.ParameterList([a, b])
    MemoryEfficientAdamW(model.parameters()).attach(model)
    x = torch.randn(2, 4, dtype=BF16) @ b
    loss = ((x @ a.detach()) @ a).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- clipping ---


@pytest.mark.parametrize("spike", [1.0, 1e4])
def test_clipping_by_tensor(spike):
    """Against clipping each gradient before a plain step."""
    one, two = pair(MemoryEfficientSGD)
    two[1].attach(two[0], max_norm=0.01, clip="tensor")
    for words in batches(3):
        one[1].zero_grad()
        (one[0].loss(words) * spike).backward()
        for p in one[0].parameters():
            if p.grad is not None:
                norm = p.grad.float().norm().item()
                one_factor = min(1.0, 0.01 / (norm + 1e-6))
                one[1]._apply(one[1].param_groups[0], p, one_factor)
        (two[0].loss(words) * spike).backward()
        two[1].step()
    pairs = zip(one[0].parameters(), two[0].parameters(), strict=True)
    assert all(torch.allclose(one[1].fp32(p), two[1].fp32(q), rtol=1e-5, atol=1e-8) for p, q in pairs)


class Recorder(nn.Module):
    """Three weights whose gradients' norms are set by the inputs; backward reaches c, then b, then a."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abc":
            setattr(self, name, nn.Parameter(torch.zeros(4, dtype=torch.float32)))

    def forward(self, norms: tuple[float, float, float]) -> Tensor:
        y = torch.zeros(())
        for name, norm in zip("abc", norms, strict=True):  # one after the other in the graph
            y = y + (getattr(self, name) * (norm / 2)).sum()
        return y


def steps_taken(passes: list[tuple[float, float, float]], **clip: Any) -> list[list[float]]:
    """Norms of the updates of a, b, c in each pass, by SGD with learning rate 1: the clipped gradients' norms."""
    model = Recorder()
    optimizer = MemoryEfficientSGD(model.parameters(), lr=1.0)
    optimizer.attach(model, **clip)
    norms = []
    for given in passes:
        before = [p.detach().clone() for p in model.parameters()]
        model(given).backward()
        optimizer.step()
        norms.append([(p - q).norm().item() for p, q in zip(model.parameters(), before, strict=True)])
    return norms


def test_running_norm_is_this_passs_as_far_as_known_and_the_last_ones_for_the_rest():
    passes = [(3.0, 4.0, 12.0), (3.0, 4.0, 12.0), (30.0, 4.0, 12.0), (3.0, 0.0, 12.0), (3.0, 4.0, 12.0)]
    got = steps_taken(passes, max_norm=1.3, clip="running")
    last = {"a": 0.0, "b": 0.0, "c": 0.0}
    for given, clipped in zip(passes, got, strict=True):
        now = dict(last)
        order = [k for k in "cba"]
        for name in order:
            now[name] = given["abc".index(name)]
            total = math.sqrt(sum(v * v for v in now.values()))
            expected = now[name] * min(1.0, 1.3 / total)
            assert clipped["abc".index(name)] == pytest.approx(expected, rel=1e-5), (given, name)
        last = now
    assert got[1] == pytest.approx([0.3, 0.4, 1.2], rel=1e-5)  # steady gradients: the clip of the whole norm, 13


def test_a_spike_is_clipped_at_once_and_leaves_no_trace():
    calm = (1.0, 1.0, 1.0)
    got = steps_taken([calm, calm, (1.0, 1e20, 1.0), calm, calm], max_norm=10.0, clip="running")
    assert max(got[2]) <= 10.0 * (1 + 1e-5)
    assert got[4] == pytest.approx(list(calm)) and got[0] == pytest.approx(list(calm))


@pytest.mark.parametrize("clip", ["running", "tensor"])
@pytest.mark.parametrize("spike", [2e19, 1e38])
def test_a_norm_whose_square_overflows_float32_is_a_norm_like_others(clip, spike):
    """The spike is clipped to the norm, what comes after is clipped as ever, and the state loads again."""
    loud = (200.0, 200.0, 200.0)
    got = steps_taken([(1.0, 1.0, 1.0), (1.0, spike, 1.0), loud, loud], max_norm=1.0, clip=clip)
    assert got[1][1] == pytest.approx(1.0, rel=1e-5)
    assert got[3] == pytest.approx([1.0 / math.sqrt(3.0) if clip == "running" else 1.0] * 3, rel=1e-5)
    model = Recorder()
    optimizer = MemoryEfficientSGD(model.parameters(), lr=1.0)
    optimizer.attach(model, max_norm=1.0, clip=clip)
    for norms in ((1.0, spike, 1.0), loud):
        model(norms).backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_no_number_counts_for_its_own_tensor_alone(value):
    """Where such gradients are let through; the state loads again."""
    model = Recorder()
    optimizer = MemoryEfficientSGD(model.parameters(), lr=1.0, nonfinite="propagate")
    optimizer.attach(model, max_norm=1.3)
    for norms in ((3.0, 4.0, 12.0), (3.0, value, 12.0), (3.0, 4.0, 12.0)):
        model(norms).backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert model.b.isnan().all()
    expected = 12 / 12 * 1.3 + 12 * 1.3 / 13 + 12 * 1.3 / math.sqrt(12**2 + 3**2)
    assert model.c.norm().item() == pytest.approx(expected, rel=1e-5)


def test_a_clipped_run_resumes_to_the_bit(tmp_path):
    def run(words: list[Tensor], load: bool) -> tuple[Tied, Any]:
        model = tied()
        optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-2)
        optimizer.attach(model, max_norm=0.5)
        if load:
            saved = torch.load(tmp_path / "at.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        for batch in words:
            model.loss(batch).backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = run(batches(3), load=False)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "at.pt")
    assert alike(run(batches(6), load=False), run(batches(6)[3:], load=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, "max_norm: 0.0, expected a positive number"),
        ({"max_norm": math.nan}, "max_norm: nan"),
        ({"max_norm": 1.0, "clip": "value"}, "clip: 'value', expected one of running, tensor"),
    ],
)
def test_wrong_clipping(options, message):
    model, optimizer = pair()[0]
    with pytest.raises(OptimizerError, match=message):
        optimizer.attach(model, **options)
    optimizer.attach(model)


# --- overflow ---


def test_nonfinite_gradients_are_raised_or_skipped_tensor_by_tensor():
    for policy in ("raise", "skip", "propagate"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(BF16)
        optimizer = MemoryEfficientAdamW(model.parameters(), nonfinite=policy)
        optimizer.attach(model)
        model[0].weight.register_hook(lambda g: g * math.nan)
        before = copy.deepcopy(model.state_dict())
        loss = model(torch.ones(2, 3, dtype=BF16)).sum()
        if policy == "raise":
            with pytest.raises(OptimizerError, match=r"0\.weight: the gradient has NaN.*\d parameters before it"):
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
        assert torch.equal(before["0.weight"], model[0].weight) is (policy != "propagate")
        assert not torch.equal(before["1.weight"], model[1].weight)
        assert optimizer.skipped == (policy == "skip")


def test_loss_scale_unscales_exactly_skips_overflows_and_adapts():
    """float16, with gradients that would vanish unscaled; against float32 gradients of the same loss."""
    plain = nn.Linear(16, 8)
    model = copy.deepcopy(plain).to(FP16)
    plain.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    scale = LossScale(2.0**13, interval=2)
    mine, other = MemoryEfficientSGD(model.parameters(), lr=1e5), torch.optim.SGD(plain.parameters(), lr=1e5)
    mine.attach(model, loss_scale=scale)
    x = torch.randn(4, 16).to(FP16)
    for _ in range(2):
        tiny = 1e-6  # float16's smallest number is 6e-8
        scale.scale(model(x).float().square().mean() * tiny).backward()
        other.zero_grad()
        (plain(x.float()).square().mean() * tiny).backward()
        mine.step(), other.step()
    assert scale.value == 2.0**14  # two clean passes
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.fp32(p) - q).abs().max() < 2e-3 * (q.abs().max())
    before = [mine.fp32(p) for p in model.parameters()]
    scale.scale(model(x).float().square().mean() * 100).backward()
    mine.step()
    assert scale.value == 2.0**13 and mine.skipped == 2
    assert all(same_bits(mine.fp32(p), b) for p, b in zip(model.parameters(), before, strict=True))


def test_loss_scale_saves_loads_and_checks():
    scale = LossScale(8.0, interval=3)
    scale.end_pass(False)
    other = LossScale(interval=3)
    other.load_state_dict(scale.state_dict())
    assert (other.value, other.clean) == (8.0, 1)
    for wrong in (
        {"value": 1.0},
        {"value": -1.0, "clean": 0},
        {"value": math.inf, "clean": 0},
        {"value": 1.0, "clean": -1},
        {"value": "x", "clean": 0},
        {"value": 1.0, "clean": None},
        {"value": 1.0, "clean": math.inf},
        {"value": torch.zeros(2), "clean": 0},
        None,
    ):
        with pytest.raises(OptimizerError, match="LossScale"):
            other.load_state_dict(wrong)
    assert (other.value, other.clean) == (8.0, 1)
    for options in ({"value": 0.0}, {"growth": 0.5}, {"backoff": 1.0}, {"interval": 0}):
        with pytest.raises(OptimizerError, match=f"LossScale.{next(iter(options))}"):
            LossScale(**options)


def test_grad_scaler_is_refused_where_it_cannot_work():
    model, optimizer = pair()[0]
    optimizer.attach(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model.loss(batches(1)[0])).backward()
    with pytest.raises(OptimizerError, match="GradScaler cannot unscale.*LossScale"):
        scaler.step(optimizer)


def test_a_refused_grad_scaler_leaves_nothing_to_the_next_step():
    layer = nn.Linear(3, 3, bias=False)
    optimizer = MemoryEfficientSGD(layer.parameters(), lr=1.0)
    handle = optimizer.attach(layer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = optimizer.fp32(layer.weight)
    with handle.accumulating():
        scaler.scale(layer(torch.ones(1, 3)).sum()).backward()
    with pytest.raises(OptimizerError, match="GradScaler cannot unscale"):
        scaler.step(optimizer)
    handle.remove()
    optimizer.zero_grad()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.allclose(before - layer.weight, torch.ones(3, 3))


# --- models that do not fit ---


def test_attach_refuses_what_would_go_wrong():
    model, optimizer = pair()[0]
    with pytest.raises(OptimizerError, match=r"a parameter \[12, 16\] of the optimizer is not in the model"):
        optimizer.attach(nn.Linear(2, 2))
    sparse = nn.ModuleDict({"words": nn.Embedding(5, 4, sparse=True)}).to(BF16)
    with pytest.raises(OptimizerError, match="words makes sparse gradients"):
        MemoryEfficientAdamW(sparse.parameters()).attach(sparse)
    words = nn.ParameterDict({"w": nn.Parameter(torch.zeros(5, 4, dtype=BF16))})
    optimizer = MemoryEfficientAdamW(words.parameters())
    optimizer.attach(words)
    with pytest.raises(OptimizerError, match="w: the gradient is sparse_coo"):
        nn.functional.embedding(torch.tensor([1, 2]), words["w"], sparse=True).sum().backward()


def test_distributed_data_parallel_is_refused(tmp_path):
    try:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    except (RuntimeError, ValueError) as e:
        pytest.skip(f"gloo cannot start here: {e}")
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2).to(BF16))
        with pytest.raises(OptimizerError, match="DistributedDataParallel, which averages gradients after"):
            MemoryEfficientAdamW(model.parameters()).attach(model)
    finally:
        dist.destroy_process_group()
