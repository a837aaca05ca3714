"""Combination with torchao: its configs in one model with ours, sparsity before quantization, optimizers in
quantization-aware training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.optim import AdamW8bit
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from torchao.quantization.granularity import PerAxis
from torchao.sparsity import WandaSparsifier

from mixdq_ao import LayerPlan, Plan, mixdq_config, quantize_
from mixdq_ao.quantize.tensor import MixDQTensor

WIDTH = 32


class Layers(nn.Module):
    """Six linear layers and a convolution, by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.ours8, self.ours4, self.ours2 = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.float8, self.int8_dynamic, self.intx, self.int8 = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)
        for name in ("ours8", "float8", "ours4", "int8_dynamic", "intx", "ours2", "int8"):
            y = y + torch.nn.functional.silu(getattr(self, name)(y))
        return y


OVERRIDES = {
    "float8": Float8WeightOnlyConfig(),
    "int8_dynamic": Int8DynamicActivationInt8WeightConfig(),
    "intx": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)),
    "re:int8": Int8WeightOnlyConfig(),
}


def picture(batch: int = 2) -> torch.Tensor:
    torch.manual_seed(8)
    return torch.randn(batch, 3, 6, 6)


def mixed() -> Plan:
    ranged = {"act_bits": 8, "act_range": (-6.0, 6.0)}
    ours = {f"ours{bits}": LayerPlan(weight_bits=bits, **ranged) for bits in (8, 4, 2)}  # type: ignore[arg-type]
    return Plan({"conv": LayerPlan(weight_bits=8, **ranged), **ours})  # type: ignore[arg-type]


def test_float8_int8_dynamic_intx_and_ours_in_one_model():
    model = Layers().eval()
    full, x = copy.deepcopy(model), picture()
    quantize_(model, mixdq_config(mixed(), overrides=OVERRIDES))
    kinds = {n: type(m.weight).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {kinds.pop(n) for n in ("conv", "ours8", "ours4", "ours2")} == {"MixDQTensor"}
    assert kinds == {
        "float8": "Float8Tensor", "int8_dynamic": "Int8Tensor", "intx": "IntxUnpackedToInt8Tensor", "int8": "Int8Tensor"
    }  # fmt: skip
    with torch.no_grad():
        exact, result = full(x), model(x)
        error = ((result - exact).norm() / exact.norm()).item()
        assert 0 < error < 0.3  # two bits in one of the layers
        values = copy.deepcopy(full)
        for name, module in values.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.copy_(model.get_submodule(name).weight.dequantize())
        assert (result - values(x)).norm() < 0.03 * exact.norm()  # what is left: 8-bit activations
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), result, rtol=1e-4, atol=1e-4)


def test_zeros_of_torchaos_sparsity_stay_zeros():
    """Two of four weights pruned (Wanda), then quantized: zero is a code of every grid."""
    model = Layers().eval()
    sparsifier = WandaSparsifier(sparsity_level=0.5, semi_structured_block_size=4)
    names = ("ours8", "ours4", "ours2")
    sparsifier.prepare(model, [{"tensor_fqn": f"{n}.weight"} for n in names])
    model(picture())
    sparsifier.step()
    sparsifier.squash_mask()
    for name in names:  # left by the observers
        layer = model.get_submodule(name)
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer
        assert (layer.weight.reshape(WIDTH, -1, 4) == 0).sum(-1).eq(2).all(), name
    zeros = {n: model.get_submodule(n).weight == 0 for n in names}
    quantize_(model, mixdq_config(mixed()))
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, MixDQTensor)
        assert (weight.dequantize()[zeros[name]] == 0).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_with_fake_quantization_and_torchaos_optimizer():
    """Quantization-aware training: the optimizer's state has 8 bits, the weights learn to live with two."""
    teacher = Layers().eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    layers = ("ours8", "ours4", "ours2", "float8", "int8_dynamic", "intx", "int8")
    plan = Plan({n: LayerPlan(weight_bits=2, act_bits=8, act_range=(-6.0, 6.0)) for n in layers})
    rounded = copy.deepcopy(teacher)
    quantize_(rounded, mixdq_config(plan))
    quantize_(student, mixdq_config(plan, mode="fake"))
    optimizer = AdamW8bit(student.parameters(), lr=3e-3, weight_decay=0.0)
    x, unseen = picture(8), torch.randn(8, 3, 6, 6)

    def error(model: nn.Module, x: torch.Tensor) -> float:
        with torch.no_grad():
            return (model(x) - teacher(x)).square().mean().item()

    with torch.compiler.set_stance("force_eager"):  # torchao compiles the step
        for _ in range(40):
            optimizer.zero_grad()
            (student(x) - teacher(x)).square().mean().backward()
            optimizer.step()
    faked = error(student, unseen)
    quantize_(student, mixdq_config(plan))
    assert all(isinstance(student.get_submodule(n).weight, MixDQTensor) for n in layers)
    assert error(student, unseen) == pytest.approx(faked, rel=0.02)
    assert error(student, unseen) < 0.5 * error(rounded, unseen)
