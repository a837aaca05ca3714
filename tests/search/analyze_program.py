"""An analysis for the test that kills it, in a process of its own: python analyze_program.py STORE OUT."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from mixdq_ao import analyze, calibrate  # noqa: E402
from tests.conftest import small_unet, unet_inputs  # noqa: E402


class Pipe:
    """Just enough of a pipeline: one call of a small UNet; its output stands for latents and pictures."""

    def __init__(self) -> None:
        self.unet = small_unet()
        torch.manual_seed(4)
        self.inputs = unet_inputs(2)

    def __call__(self, **kwargs: object) -> SimpleNamespace:
        y = self.unet(**self.inputs)[0]
        pictures = torch.nn.functional.interpolate(y[:, :3].sigmoid(), scale_factor=2)
        return SimpleNamespace(images=y if kwargs["output_type"] == "latent" else pictures)


def run(store: str | Path, out: str | Path) -> None:
    pipe = Pipe()
    calibration = calibrate(pipe.unet, run=lambda: pipe.unet(**pipe.inputs))
    bits = {"weight_bits": (2,), "act_bits": (8,)}
    analyze(pipe, ["a", "b"], store=store, calibration=calibration, batch_size=2, **bits).save(out)


if __name__ == "__main__":
    run(*sys.argv[1:])
