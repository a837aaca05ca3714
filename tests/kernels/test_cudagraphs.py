"""Quantized blocks can be captured in CUDA graphs; checked in the code for a GPU, without one.

``mode="reduce-overhead"`` and ``"max-autotune"`` capture a graph unless Inductor finds a reason not to.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from inductor_kernels.testing import cudagraph_obstacles
from mixdq_ao import mixdq_config, quantize_
from mixdq_ao.models.text_reuse import reuse_text_projections
from mixdq_ao.plan import Plan
from mixdq_ao.quantize.tensor import is_quantized

from ..conftest import text_rows

pytest.importorskip("triton")
TRANSFORMER = "down_blocks.1.attentions.0.transformer_blocks.0"
SHORTCUT = "up_blocks.1.resnets.0"


@pytest.fixture
def model(unet, calibration):
    """The small UNet with 8-, 4- and 2-bit weights, BOS rows and a split shortcut, 16-bit activations in places."""
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    layers = {n: replace(v, weight_bits=(8, 4, 2)[i % 3]) for i, (n, v) in enumerate(plan.layers.items())}
    layers = {n: replace(v, act_bits=16) if n.endswith("ff.net.2") else v for n, v in layers.items()}
    quantize_(unet, mixdq_config(Plan(layers, plan.metadata, plan.bos_embedding)))
    return unet


class Block(torch.nn.Module):
    """A transformer block with positional arguments only."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, text):
        return self.block(x, encoder_hidden_states=text)


def test_a_transformer_block_with_bos_rows(model):
    block = Block(model.get_submodule(TRANSFORMER))
    assert block.block.attn2.to_k.weight.bos_output is not None
    assert cudagraph_obstacles(block, torch.randn(2, 16, 16), text_rows(2)) == []


def test_a_residual_block_with_a_split_shortcut(model):
    block = model.get_submodule(SHORTCUT)
    assert type(block.conv_shortcut.weight).__name__ == "SplitMixDQTensor"
    channels = block.conv1.weight.shape[1]
    temb = torch.randn(2, block.time_emb_proj.weight.shape[1])
    assert cudagraph_obstacles(block, torch.randn(2, channels, 8, 8), temb) == []


def test_nothing_of_a_weight_stays_behind_on_the_cpu(model):
    """A CPU scalar among the inputs rules out CUDA graphs, so moving a model must move all parts of its weights."""
    weights = [p for p in copy.deepcopy(model).to("meta").parameters() if is_quantized(p)]
    assert weights and all(t.is_meta for w in weights for t in w.stored_tensors().values())


def test_stored_keys_and_values_stay_where_a_captured_graph_reads_them(model):
    pipe = type("Pipe", (), {"unet": model})()
    reuse = reuse_text_projections(pipe).unet.text_reuse
    place = {}
    for seed in range(2):
        torch.manual_seed(seed)
        text = text_rows(2)
        for projection, value in zip(reuse.projections, reuse._products(text), strict=True):
            projection.store(value)
            assert place.setdefault(projection, projection.stored.data_ptr()) == projection.stored.data_ptr()


def synchronises(x):
    return x * x.sum().item()


def writes_its_input(x):
    return x.add_(1) * 2


def leaves_the_gpu(x):
    return x.cpu() + 1


def stays(x):
    return x + 1


@pytest.mark.parametrize(
    ("fn", "words"),
    [(synchronises, "scalar_dense|symbol"), (writes_its_input, "change"), (leaves_the_gpu, "cpu"), (stays, None)],
)
def test_obstacles_are_found(fn, words):
    import re

    try:
        found = cudagraph_obstacles(fn, torch.randn(8, 8))
    except Exception as error:  # a number read from the GPU cannot even be traced for one that is not there
        found = [type(error).__name__, str(error)] if fn is synchronises else []
        words = "Unbacked|DataDependent|symbol|item"
    assert (found == []) if words is None else re.search(words, " ".join(found))
