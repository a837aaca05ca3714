"""Features of FID: the Inception v3 of the original FID, from the package torch-fidelity."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import MixDQError
from .resize import stretch_to
from .weights import digest_of, package, read_weights

Resize = Literal["tensorflow", "clean"]
SIZE = 299


class Inception:
    """Maps uint8 pictures [B, 3, H, W] to the 2048 features before the last layer, float32.

    ``tensorflow`` resizes like the original FID: bilinear, without antialiasing, inside the network. ``clean`` resizes
    before, with Pillow's antialiased bicubic filter (Parmar et al. 2022), and rounds to the network's 8-bit input
    (clean-fid does not round). Figures of the two are not comparable.
    """

    def __init__(self, network: Any, *, resize: Resize = "tensorflow", source: str = "") -> None:
        self._network, self._resize = network, resize
        self.identity = f"inception {source} {resize}".replace("  ", " ")

    @classmethod
    def load(cls, weights: Path, *, resize: Resize = "tensorflow", device: str = "cpu") -> Inception:
        """Loads torch-fidelity's and pytorch-fid's weights (weights-inception-2015-12-05) from a safetensors file."""
        module = package("torch_fidelity.feature_extractor_inceptionv3", "FID")
        state = read_weights(weights, "the weights of FID's Inception v3")
        # the package only unpickles weights, so it gets a pickle that is written here
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "weights.pth"
            torch.save(state, path)
            try:
                network = module.FeatureExtractorInceptionV3("inception", ["2048"], str(path))
            except RuntimeError as e:
                raise MixDQError(f"{weights}: holds another network than FID's Inception v3: {e}") from e
        return cls(network.to(device), resize=resize, source=digest_of(weights))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self._resize == "clean":
            images = stretch_to(images, SIZE)
        return self._network(images.to(next(self._network.parameters()).device))[0].float()
