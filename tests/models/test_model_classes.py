"""Tiny random denoisers of other families: finds layers, quantizes, saves, loads, runs and exports them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

from mixdq_ao import Plan, calibrate, load_quantized, mixdq_config, quantize_
from mixdq_ao.layers import find_layers
from mixdq_ao.quantize.tensor import is_quantized

from .same import assert_same


@dataclass(frozen=True)
class Family:
    name: str
    config: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]
    least: int  # layers to be found
    extra: Any = None


FLUX = Family(
    "FluxTransformer2DModel",
    {
        "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 8),
    },
    {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 7, 32), "pooled_projections": (2, 24)},
    25,
    {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)},
)  # fmt: skip
SD35 = Family(
    "SD3Transformer2DModel",
    {
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32,
        "pooled_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    },
    {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 32), "pooled_projections": (2, 64)},
    30,
)  # fmt: skip
SANA = Family(
    "SanaTransformer2DModel",
    {
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1,
        "attention_head_dim": 4, "num_attention_heads": 2, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8,
    },
    {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 8, 8)},
    15,
)  # fmt: skip
PIXART = Family(
    "PixArtTransformer2DModel",
    {
        "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 4, "num_attention_heads": 2,
        "in_channels": 4, "out_channels": 8, "cross_attention_dim": 8, "caption_channels": 8,
        "use_additional_conditions": False,
    },
    {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 8, 8)},
    15,
    {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
)  # fmt: skip
WAN = Family(
    "WanTransformer3DModel",
    {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    },
    {"hidden_states": (2, 4, 2, 8, 8), "encoder_hidden_states": (2, 6, 16)},
    24,
)  # fmt: skip
FAMILIES = [FLUX, SD35, SANA, PIXART, WAN]


def build(family: Family) -> Any:
    torch.manual_seed(0)
    model = getattr(diffusers, family.name)(**family.config).eval()
    with torch.no_grad():  # some initialise what comes last to zero
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def inputs(family: Family, batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(1)
    tensors = {n: torch.randn(batch, *shape[1:]) for n, shape in family.inputs.items()}
    return {**tensors, "timestep": torch.full((batch,), 500), "return_dict": False, **(family.extra or {})}


def output(model: Any, family: Family, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(family, batch))[0]


@pytest.fixture(params=FAMILIES, ids=lambda f: f.name)
def family(request):
    return request.param


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_save_load_run(family, bits, tmp_path):
    model = build(family)
    exact = output(model, family)
    found = find_layers(model)
    assert len(found) >= family.least
    calibration = calibrate(model, run=lambda: [output(model, family) for _ in range(2)])
    plan = Plan.uniform(model, bits, 8).with_calibration(calibration)
    quantize_(model, mixdq_config(plan))
    assert all(is_quantized(m.weight) for m in find_layers(model).values())
    result = output(model, family)
    error = ((result - exact).norm() / exact.norm()).item()
    assert 0 < error < {8: 0.05, 4: 0.5}[bits]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert torch.equal(output(loaded, family), result)
    assert_same(model, load_quantized(tmp_path))
    assert output(loaded, family, batch=3).shape[0] == 3


def test_weights_alone_and_16_bit_floats(family):
    model = build(family).to(torch.bfloat16)
    full = copy.deepcopy(model)
    quantize_(model, mixdq_config(Plan.uniform(model, 8, 16)))

    def cast(v):
        return v.to(torch.bfloat16) if isinstance(v, torch.Tensor) and v.is_floating_point() else v

    call = {n: cast(v) for n, v in inputs(family).items()}
    with torch.no_grad():
        exact, result = full(**call)[0].float(), model(**call)[0].float()
    assert (result - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(b, marks=pytest.mark.slow) for b in ("aot_eager", "inductor"))]
)
def test_one_compiled_graph_gives_the_same(family, backend):
    """Codes near a rounding boundary may differ by one, since compiled code adds in another order."""
    torch._dynamo.reset()
    model = build(family)
    plan = Plan.uniform(model, 4, 8).with_calibration(calibrate(model, run=lambda: output(model, family)))
    quantize_(model, mixdq_config(plan))
    expected = output(model, family)
    found = output(torch.compile(model, fullgraph=True, backend=backend), family)
    assert (found - expected).norm() <= 0.01 * expected.norm()
