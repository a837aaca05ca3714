"""Tied layers hold the same activation parameters: one object, one quantization in the graph, one compilation."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from mixdq_ao.quantize import tensor as tensor_module
from mixdq_ao.quantize.quantizer import act_params
from mixdq_ao.quantize.shared import moved
from mixdq_ao.quantize.tensor import MixDQTensor, SplitMixDQTensor

WIDTH = 16


def weight(hi: float = 3.0, bos: float | None = None) -> MixDQTensor:
    embedding = None if bos is None else torch.full((WIDTH,), bos)
    return MixDQTensor.from_hp(torch.randn(WIDTH, WIDTH), act=act_params(-1.0, hi), bos_embedding=embedding)


class Readers(nn.Module):
    """Three layers that read one tensor; the last has its own range."""

    def __init__(self, *ranges: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in ranges)
        for layer, hi in zip(self.layers, ranges, strict=True):
            layer.weight = nn.Parameter(weight(hi), requires_grad=False)

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def shares(a: MixDQTensor, b: MixDQTensor) -> bool:
    return all(getattr(a, name) is getattr(b, name) for name in MixDQTensor.shared_tensors)


@pytest.mark.parametrize(
    "change",
    [lambda w: w, lambda w: nn.Parameter(w, requires_grad=False), lambda w: w.detach(), torch.clone]
    + [lambda w: w.to(torch.bfloat16), lambda w: w[:8]],
)
def test_equal_values_are_one_object(change):
    a, b = change(weight(bos=7.0)), change(weight(bos=7.0))
    assert shares(a, b) and a.qdata is not b.qdata


def test_a_copied_model_shares_within():
    model = copy.deepcopy(Readers(3.0, 3.0))
    assert shares(model.layers[0].weight, model.layers[1].weight)


def test_other_values_are_not():
    assert weight(3.0).act_inv_scale is not weight(4.0).act_inv_scale
    assert weight(bos=7.0).bos_embedding is not weight(bos=8.0).bos_embedding


def test_copying_into_one_leaves_the_others():
    a, b = weight(3.0), weight(3.0)
    before = b.act_inv_scale.clone()
    a.copy_(weight(5.0))
    assert torch.equal(b.act_inv_scale, before) and not torch.equal(a.act_inv_scale, before)
    assert shares(a, weight(5.0))


def test_what_is_known_on_a_device_is_not_moved_there_again():
    held, cpu = weight(bos=7.0), torch.device("cpu")
    beside = held.act_scale
    assert moved(held.bos_embedding.clone(), cpu) is held.bos_embedding
    assert moved(held.act_zero_point.clone(), cpu, beside.clone()) is held.act_zero_point
    assert moved(held.act_zero_point.clone(), cpu, beside * 2) is not held.act_zero_point


@pytest.mark.parametrize("split", [False, True])
def test_a_pinned_weight_is_pinned(monkeypatch, split):
    """Offloading pins unpinned tensors before every copy; row sums are computed once."""
    held = weight(bos=7.0)
    whole = SplitMixDQTensor(held, weight(), torch.float32) if split else held
    pinned = []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    def is_pinned(tensor):
        return any(tensor is p for p in pinned) or (
            type(tensor) is not torch.Tensor and torch.ops.aten.is_pinned.default(tensor)
        )

    with monkeypatch.context() as patch:  # there is no pinned memory without a GPU
        patch.setattr(torch.Tensor, "pin_memory", lambda t: pin(t) if type(t) is torch.Tensor else pin_weight(t))
        patch.setattr(torch.Tensor, "is_pinned", is_pinned)
        pin_weight = torch.ops.aten._pin_memory.default
        assert not whole.is_pinned()
        copied = whole.pin_memory()
        assert copied.is_pinned() and not whole.is_pinned()
    first = copied.first if split else copied
    assert shares(first, held) and first.shared_key == held.shared_key
    assert torch.equal(first.weight_sum, held.integers().flatten(1).sum(1)) and held.weight_sum is None
    assert torch.equal(copied.dequantize(), whole.dequantize())


def test_nothing_is_kept_alive():
    from mixdq_ao.quantize import shared

    key = weight(1234.5).act_inv_scale.item()
    assert all(t.item() != key for t in shared._by_value.values() if t.dim() == 0)


def zero_points(graphs):
    return [{n.args[5] for n in g.graph.nodes if n.target == torch.ops.inductor_kernels.linear.default} for g in graphs]


def test_one_quantize_serves_tied_readers_and_no_other_pattern_is_taken_for_it():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(4, WIDTH)
    step = torch.compile(lambda model, x: model(x), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        for ranges in ((3.0, 3.0, 4.0), (3.5, 3.5, 4.5), (3.0, 4.0, 4.0)):
            model = Readers(*ranges)
            assert torch.allclose(step(model, x), model(x))
    assert [len(z) for z in zero_points(graphs)] == [2, 2]  # the second pattern recompiles, other values do not


def test_the_cache_of_compiled_code_tells_patterns_apart():
    """Inductor's disk cache keys on types and shapes only; this hash adds which weights share tensors."""
    keys = [weight(hi)._stable_hash_for_caching() for hi in (3.0, 3.0, 4.0)]
    assert keys[0] == keys[1] != keys[2]


def test_parts_of_a_weight_do_not_read_the_shared_numbers_again(monkeypatch):
    """Reading values would synchronize with a GPU, once for every layer that FSDP2 gathers."""
    weight = MixDQTensor.from_hp(torch.randn(8, 6), act=act_params(-1.0, 2.0), bos_embedding=torch.ones(6))
    monkeypatch.setattr(tensor_module, "key", lambda *tensors: pytest.fail("read off the device"))
    for part in (weight[:4], weight.view(-1), weight.with_tensors(scale=weight.scale.clone())):
        assert part.shared_key == weight.shared_key
