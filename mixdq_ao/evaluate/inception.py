"""Features of FID: Inception v3 as it was for the first FID, by the package torch-fidelity."""

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
    """uint8 pictures [B, 3, H, W] to the 2048 features before the last layer, float32.

    ``tensorflow`` resizes as the first FID did: bilinear, without antialiasing, inside the network. ``clean`` resizes
    first with Pillow's antialiased bicubic filter (Parmar et al. 2022), rounded to 8 bits because the network reads
    those (clean-fid does not round). Figures of the two are not comparable.
    """

    def __init__(self, network: Any, *, resize: Resize = "tensorflow", source: str = "") -> None:
        self._network, self._resize = network, resize
        self.identity = f"inception {source} {resize}".replace("  ", " ")

    @classmethod
    def load(cls, weights: Path, *, resize: Resize = "tensorflow", device: str = "cpu") -> Inception:
        """From a safetensors file of the weights that torch-fidelity and pytorch-fid use
        (weights-inception-2015-12-05, converted)."""
        module = package("torch_fidelity.feature_extractor_inceptionv3", "FID")
        state = read_weights(weights, "the weights of FID's Inception v3")
        # The package reads weights by unpickling and not otherwise: it is given a file that was written here.
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
