"""What each process of the FSDP2 test runs: sharded training against the same training in one process, on gloo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchao.optim.subclass_8bit import OptimState8bit

from mixdq_ao import MemoryEfficientAdamW
from mixdq_ao.errors import OptimizerError

from .models import BF16, same_bits

LAYERS, WIDTH = 3, 24


def net() -> nn.Sequential:
    """Layers of which some do not divide by two (25 rows), and one bias of a single element."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.Linear(WIDTH, 25), nn.Linear(25, 1))


def shard(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data(step: int) -> Tensor:
    """[2, 4, WIDTH]: a batch for each process; values that bfloat16 sums and halves exactly are not needed."""
    return torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(step)).to(BF16)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def sharded(**attach: Any) -> tuple[nn.Sequential, MemoryEfficientAdamW]:
    """A sharded model with the exact float32 start, and its optimizer."""
    start = {name: p.detach().clone() for name, p in net().named_parameters()}
    model = shard(net().to(BF16))
    optimizer = MemoryEfficientAdamW(model.named_parameters(), lr=1e-2)
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        optimizer.set_fp32(p, distribute_tensor(start[name], p.device_mesh, p.placements))
    if attach:
        optimizer.attach(model, **{k: v for k, v in attach.items() if k != "on"})
    return model, optimizer


def backward(model: nn.Module, step: int) -> None:
    model(data(step)[dist.get_rank()]).float().square().mean().backward()


def train(model: nn.Module, optimizer: MemoryEfficientAdamW, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module, optimizer: MemoryEfficientAdamW) -> list[Tensor]:
    return [whole(optimizer.fp32(p)) for p in model.parameters()]


def check_same_as_torch_on_the_gathered_gradients() -> None:
    """torch.optim.AdamW in float32 on whole parameters, given the gradients FSDP made: bit for bit."""
    model, optimizer = sharded()
    reference = net()
    other = torch.optim.AdamW(reference.parameters(), lr=1e-2, foreach=False)
    for step in range(5):
        backward(model, step)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert p.grad is not None
            q.grad = whole(p.grad).float()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
    assert all(same_bits(a, q) for a, q in zip(values(model, optimizer), reference.parameters(), strict=True))
    state = optimizer.state[model[3].weight]
    assert state["bfloat16_remainder"].to_local().numel() == (13 - dist.get_rank()) * WIDTH


def check_in_backward() -> None:
    """Inside backward as after it; gradients are gone when backward returns."""
    one, two = sharded(), sharded(on=True)
    train(*one, range(4))
    for step in range(4):
        backward(two[0], step)
        assert all(p.grad is None for p in two[0].parameters())
        two[1].step()
    assert all(map(same_bits, values(*one), values(*two)))


def check_clipping() -> None:
    """Norms are of whole gradients: both processes use the same factor, that of the running norm."""
    model, optimizer = sharded(max_norm=1e-3)
    train(model, optimizer, range(3))
    squares = torch.stack([optimizer.state[p]["grad_square"] for p in model.parameters()])
    both = [torch.zeros_like(squares) for _ in range(2)]
    dist.all_gather(both, squares)
    assert torch.equal(*both) and (squares > 0).all()
    plain, plain_optimizer = sharded()
    backward(plain, 0)
    assert whole(plain[0].weight.grad).float().square().sum() > 0


def check_resume(directory: str) -> None:
    """Saved with torch.distributed.checkpoint, loaded into a fresh model: the same to the bit."""
    model, optimizer = sharded()
    train(model, optimizer, range(3))
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=directory)
    train(model, optimizer, range(3, 6))

    again = shard(net().to(BF16))
    fresh = MemoryEfficientAdamW(again.named_parameters(), lr=0.5)
    weights, states = get_state_dict(again, fresh)
    saved = {"model": weights, "optimizer": states}
    dcp.load(saved, checkpoint_id=directory)
    set_state_dict(again, fresh, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    train(again, fresh, range(3, 6))
    assert fresh.param_groups[0]["lr"] == 1e-2
    assert all(map(same_bits, values(model, optimizer), values(again, fresh)))


def check_nan_in_one_process() -> None:
    """A NaN in one process's shard is raised, or skipped, in both: nobody waits for the other."""
    for policy in ("raise", "skip"):
        model, optimizer = sharded()
        optimizer.defaults["nonfinite"] = policy
        before = values(model, optimizer)
        backward(model, 0)
        if dist.get_rank() == 1:
            grad = model[0].weight.grad
            assert isinstance(grad, DTensor)
            grad.to_local()[0, 0] = torch.nan
        try:
            optimizer.step()
            assert policy == "skip" and optimizer.skipped == 1
        except OptimizerError as e:
            assert policy == "raise"
            name = "0.weight" if dist.get_rank() == 1 else "a parameter's part in another process"
            assert str(e).startswith(name), e
        assert all(map(same_bits, before, values(model, optimizer)))


def check_8bit_moments() -> None:
    """torchao's blocks of a shard; saved and loaded to the bit."""

    def run(saved: Any = None) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        layer = nn.Linear(128, 128, bias=False).to(BF16)
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        optimizer = MemoryEfficientAdamW(layer.parameters(), moments="8bit")
        if saved is not None:
            layer.weight.to_local().data.copy_(saved[0])
            optimizer.load_state_dict(saved[1])
        for step in range(2):
            layer(torch.full((1, 128), 1.0 + step, dtype=BF16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        local = layer.weight.to_local().detach().clone()
        assert isinstance(optimizer.state[layer.weight]["exp_avg"].to_local(), OptimState8bit)
        return local, optimizer.state_dict()  # nothing steps it any more

    first = run()
    again, twin = run(first), run(first)
    assert not torch.equal(first[0], again[0]) and torch.equal(again[0], twin[0])


def check_written_by_others() -> None:
    """A write through the sharded parameter's name counts, to its local part too; nothing FSDP2 does counts."""
    model, optimizer = sharded()
    train(model, optimizer, range(2))
    p, q = model[0].weight, model[1].weight
    assert isinstance(q, DTensor)
    exact = whole(optimizer.fp32(p))
    model(data(0)[dist.get_rank()])
    assert same_bits(whole(optimizer.fp32(p)), exact) and not torch.equal(exact, whole(p).float())
    with torch.no_grad():
        p.mul_(0.5)
        q.to_local().mul_(0.5)
    assert all(torch.equal(whole(optimizer.fp32(w)), whole(w).float()) for w in (p, q))
    state = optimizer.state_dict()["state"]
    remainders = {w: state[i]["bfloat16_remainder"].to_local() for i, w in enumerate(model.parameters())}
    assert [bool(remainders[w].any()) for w in (p, q, model[2].weight)] == [False, False, True]


def check_refusals() -> None:
    model = shard(net())
    try:
        MemoryEfficientAdamW.from_fp32(model)
    except OptimizerError as e:
        assert "0.weight is sharded" in str(e)
    else:
        raise AssertionError("from_fp32 took a sharded model")


def main(rank: int, store: str, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    checks: list[Callable[[], None]] = [
        check_same_as_torch_on_the_gathered_gradients,
        check_in_backward,
        check_clipping,
        lambda: check_resume(directory),
        check_nan_in_one_process,
        check_8bit_moments,
        check_written_by_others,
        check_refusals,
    ]
    for check in checks:
        check()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
