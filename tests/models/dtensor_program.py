"""One of two processes: python -m tests.models.dtensor_program RANK PORT. Prints the largest relative difference."""

from __future__ import annotations

import copy
import itertools
import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mixdq_ao.quantize.quantizer import act_params
from mixdq_ao.quantize.tensor import MixDQTensor

from .ranks import end
from .same import assert_same

BOS = torch.linspace(-3, 3, 20)
PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


class FeedForward(nn.Module):
    """Two layers. Half of the 22 input features do not fill whole bytes, at 4 and at 2 bits."""

    def __init__(self, bits: int, bias: bool, bos: torch.Tensor | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(20, 22, bias), nn.Linear(22, 6, bias)
        self.requires_grad_(False)
        for layer, embedding in ((self.up, bos), (self.down, None)):
            weight = MixDQTensor.from_hp(layer.weight.data, bits, act=act_params(-3, 4), bos_embedding=embedding)
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def difference(model: FeedForward, x: torch.Tensor, mesh, source: int | None, inference: bool) -> float:
    """The difference of the sharded model's output from the whole one's, relative to its largest output. Also checks
    that gathered weights are the same to the bit."""
    bos = model.up.weight.bos_embedding
    (expected, wanted), whole = with_gradient(model, x), copy.deepcopy(model)
    if source is not None and mesh.get_local_rank() != source:  # what it holds must not matter
        model = FeedForward(model.up.weight.bits, model.up.bias is not None, bos)
        for layer in (model.up, model.down):
            layer.weight.qdata.zero_()
    parallelize_module(model, mesh, {name: style() for name, style in PLAN.items()}, src_data_rank=source)
    for layer, shape in ((model.up, (11, 20)), (model.down, (6, 11))):
        assert isinstance(layer.weight, DTensor) and type(layer.weight.to_local()) is MixDQTensor
        assert layer.weight.to_local().shape == shape
    with torch.inference_mode(inference):
        found = model(x)
    gradient = with_gradient(model, x)[1]
    for layer in (model.up, model.down):
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(parameter.full_tensor(), requires_grad=False))
    assert_same(model, whole)
    rows = slice(None if bos is None else 1, None)  # torch's own backward gives BOS rows a gradient as well
    return max(apart(found, expected), apart(gradient[:, rows], wanted[:, rows]))


def with_gradient(model: FeedForward, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the gradient its squares give to the input."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = model(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main(rank: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh, worst = init_device_mesh("cpu", (2,)), 0.0
    cases = itertools.product((8, 4, 2), (True, False), ((0, BOS), (None, None)), (False, True))
    for bits, bias, (source, bos), inference in cases:
        x = torch.randn(5, 2, 20, generator=torch.Generator().manual_seed(bits)).transpose(0, 1)
        x = x if bias else x.contiguous()
        x[:, 0] = BOS
        model = FeedForward(bits, bias, bos)
        with torch.no_grad():
            worst = max(worst, difference(model, x, mesh, source, inference))
    with pytest.raises(NotImplementedError, match="ColwiseParallel"):
        distribute_tensor(FeedForward(4, True, BOS).up.weight, mesh, [Shard(1)])
    with pytest.raises(NotImplementedError, match="divided evenly"):
        distribute_tensor(MixDQTensor.from_hp(torch.randn(5, 4), 4), mesh, [Shard(0)])
    end(worst)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
