"""A toy pipeline with outlier channels, a calibration and a plan with smoothing and rotation, and a call of it.

``calibration`` and ``plan`` are fixtures of the test modules that take over these names.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mixdq_ao import Calibration, Plan, calibrate
from tests.search.zoo import ZOO, ToyPipeline

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
PROMPTS = ["0", "1"]


def text(i: int) -> Tensor:
    """A text embedding whose row 0 is large and the same for every prompt."""
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(i))
    rows[0] = 40 * torch.randn(12, generator=torch.Generator().manual_seed(99))
    return rows


def toy() -> ToyPipeline:
    """SD 1.5's layout with outlier channels after norms, in values and after GEGLU."""
    pipe = ToyPipeline(ZOO["SD 1.5"], text)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith(("norm1.weight", "norm3.weight", "attn1.to_v.weight", "ff.net.0.proj.weight")):
                parameter[3] *= 20
    return pipe


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(toy(), PROMPTS, smoothing=0.5, rotation=True)


@pytest.fixture(scope="module")
def plan(calibration: Calibration) -> Plan:
    return Plan.uniform(toy().transformer, 8, 8).with_calibration(calibration)


def call(model: nn.Module, name: str = "SD 1.5", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(2, *ZOO[name].latent, generator=generator).to(dtype)
    words = torch.stack([text(0), text(1)]).to(dtype)
    inputs = ZOO[name].inputs(latent, words)
    cast = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    with torch.no_grad():
        return model(**cast, return_dict=False)[0]
