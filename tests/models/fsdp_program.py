"""One of several processes: python -m tests.models.fsdp_program RANK PORT [PROCESSES]."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mixdq_ao.quantize.fsdp import undivided
from mixdq_ao.quantize.quantizer import act_params
from mixdq_ao.quantize.tensor import MixDQTensor

from .ranks import end


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.wide = nn.Linear(6, 10)
        self.odd = nn.Linear(10, 7)
        self.text = nn.Linear(7, 8)
        act, bos = act_params(-3, 3), torch.arange(7.0)
        for layer, bits in ((self.conv, 8), (self.wide, 4), (self.odd, 2)):
            layer.weight = nn.Parameter(MixDQTensor.from_hp(layer.weight.data, bits, act=act), requires_grad=False)
        weight = MixDQTensor.from_hp(self.text.weight.data, 8, act=act, bos_embedding=bos)
        self.text.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(self.odd(self.wide(self.conv(x).permute(0, 2, 3, 1))))


def gradient_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of the input. Weights are gathered again, to be read in backward."""
    x = x.detach().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None and x.grad.any()
    return x.grad


def main(rank: int, port: str, processes: int = 2) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    model, x = Small(), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected = model(x)
    gradient = gradient_of(model, x)
    ignored = undivided(model, processes)
    assert ignored == ({model.odd.weight} if processes == 2 else set())
    mesh = init_device_mesh("cpu", (processes,))
    for layer in (model.conv, model.wide, model.text):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    local = model.wide.weight.to_local()
    assert isinstance(local, MixDQTensor) and local.shape == (10 // processes, 6) and local.bits == 4
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert torch.equal(gradient_of(model, x), gradient)
    end(0.0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
