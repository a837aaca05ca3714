"""LPIPS: a perceptual distance from the features of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import MixDQError
from .metric import Batch, MeanMetric, Rows, column
from .weights import package

Distance = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches [B, 3, H, W] in [-1, 1] to the distance of each pair, [B]."""


class LPIPS(MeanMetric):
    """Mean learned perceptual distance to the reference pictures (Zhang et al. 2018); 0 for equal pictures.

    Args:
        distance: maps two batches [B, 3, H, W] in [-1, 1] to [B].
        source: identifies the network, as text.
    """

    name = "lpips"
    better = "lower"
    needs = frozenset({"reference"})

    def __init__(self, distance: Distance, *, source: str = "") -> None:
        super().__init__()
        self._distance, self._source = distance, source

    @classmethod
    def load(cls, network: Literal["alex", "vgg", "squeeze"] = "alex", device: str = "cpu") -> LPIPS:
        """Loads the network of torchmetrics and torchvision; its weights are downloaded on first use into torch's hub
        directory (TORCH_HOME). Raises MixDQError if a package or the weights are missing."""
        package("torchvision", "LPIPS")
        module = package("torchmetrics.image.lpip", "LPIPS")
        try:
            net = module.LearnedPerceptualImagePatchSimilarity(net_type=network).net.to(device)
        except OSError as e:
            raise MixDQError(
                f"LPIPS needs torchvision's weights of {network!r}, which cannot be had ({e}); put the file into "
                f"{torch.hub.get_dir()}/checkpoints"
            ) from e
        return cls(lambda a, b: net(a.to(device), b.to(device)).flatten(), source=network)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"network": self._source}

    @torch.no_grad()
    def measure(self, batch: Batch) -> Rows:
        assert batch.reference is not None
        return column(self._distance(batch.images.float() / 127.5 - 1, batch.reference.float() / 127.5 - 1))
