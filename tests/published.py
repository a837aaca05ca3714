"""Where the MixDQ authors' files for SDXL-Turbo are; they have no licence and are not part of this project."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from mixdq_ao.search.sensitivity import Sensitivity

NEXT_TO_REPOSITORY = Path(__file__).parents[1] / ".." / "shared" / "published" / "sdxl_turbo"
FOLDER = Path(os.environ.get("MIXDQ_PUBLISHED", NEXT_TO_REPOSITORY))

needs_published = pytest.mark.skipif(
    not (FOLDER / "weight_ratio.yaml").exists(),
    reason="the published SDXL-Turbo files are absent; set MIXDQ_PUBLISHED to a folder that holds them",
)


@cache
def sensitivity() -> Sensitivity:
    return Sensitivity.from_mixdq_yaml(
        weight_ssim=FOLDER / "weight_sensitivity_ssim.yaml",
        weight_sqnr=FOLDER / "weight_sensitivity_sqnr.yaml",
        act_ssim=FOLDER / "act_sensitivity_ssim.yaml",
        act_sqnr=FOLDER / "act_sensitivity_sqnr.yaml",
        weight_ratio=FOLDER / "weight_ratio.yaml",
        act_ratio=FOLDER / "act_ratio.yaml",
    )
