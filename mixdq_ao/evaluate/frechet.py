"""Frechet distance of two Gaussians, and the influence of each sample on it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import MixDQError
from ..search.metrics import gaussian_distance
from ..tensorfile import write_safetensors

SMALLEST = 1e-12
"""Eigenvalues below this fraction of the largest are treated as zero."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of features, float64, and the number of pictures (None: not known)."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @classmethod
    def of(cls, features: NDArray[np.floating] | Tensor) -> Gaussian:
        """The mean and the unbiased covariance of features [n, d], n >= 2."""
        features = torch.as_tensor(features).double()
        if features.ndim != 2 or len(features) < 2:
            raise MixDQError(f"features are {tuple(features.shape)}, expected [n, d] with n >= 2")
        return cls(features.mean(0), torch.atleast_2d(torch.cov(features.T)), len(features))

    @property
    def digest(self) -> str:
        """Digest of the bytes of mean and covariance."""
        found = hashlib.blake2b(digest_size=16)
        for tensor in (self.mean, self.covariance):
            found.update(tensor.cpu().numpy().tobytes())
        return found.hexdigest()

    def save(self, path: str | os.PathLike[str], features: str) -> None:
        """Writes a safetensors file that also names the ``features`` it was computed with."""
        tensors = {"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count or 0)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(Path(path), tensors, {"features": features})

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: str | None = None) -> Gaussian:
        """Reads a file of ``save``, or an .npz with ``mu`` and ``sigma`` as other tools write; nothing is unpickled.

        ``features``: the features that the file must be computed with; an .npz does not name them. Raises MixDQError
        naming the file.
        """
        path = Path(path)
        read = _from_npz if path.suffix == ".npz" else _from_safetensors
        try:
            mean, covariance, count, made_by = read(path)
        except MixDQError:
            raise
        except Exception as e:
            raise MixDQError(
                f"{path}: cannot be read: {e}; expected a file of mixdq evaluate real, or an .npz with mu and sigma"
            ) from e
        d = len(mean)
        if mean.ndim != 1 or covariance.shape != (d, d) or not covariance.isfinite().all() or not mean.isfinite().all():
            raise MixDQError(
                f"{path}: mean is {tuple(mean.shape)} and covariance {tuple(covariance.shape)}, expected finite "
                "[d] and [d, d]"
            )
        if features is not None and made_by not in (None, features):
            raise MixDQError(f"{path}: was made by features {made_by!r}, expected {features!r}; make it with those")
        return cls(mean, covariance, count or None)


def _from_npz(path: Path) -> tuple[Tensor, Tensor, int, str | None]:
    with np.load(path, allow_pickle=False) as file:
        missing = {"mu", "sigma"} - set(file.files)
        if missing:
            raise MixDQError(f"{path}: has no array {min(missing)!r}, expected mu and sigma")
        mean, covariance = (torch.from_numpy(np.asarray(file[n], dtype=np.float64)) for n in ("mu", "sigma"))
    return mean, covariance, 0, None


def _from_safetensors(path: Path) -> tuple[Tensor, Tensor, int, str | None]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        missing = {"mean", "covariance", "count"} - set(file.keys())
        if missing:
            raise MixDQError(f"{path}: has no tensor {min(missing)!r}; expected a file of mixdq evaluate real")
        mean, covariance = file.get_tensor("mean").double(), file.get_tensor("covariance").double()
        return mean, covariance, int(file.get_tensor("count")), (file.metadata() or {}).get("features")


def distance(a: Gaussian, b: Gaussian) -> float:
    """The Frechet distance (Heusel et al. 2017, equation 6; see ``gaussian_distance``). Raises MixDQError if the
    dimensions differ."""
    _same_size(a, b)
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def influence(features: NDArray[np.floating] | Tensor, b: Gaussian) -> NDArray[np.float64]:
    """[n]: the influence function of the distance between features [n, d] and ``b``, at each sample x: the derivative
    by its weight, ``2 (ma - mb) (x - ma) + (x - ma)' (I - T) (x - ma) - tr((I - T) Ca)``.

    T = Cb^(1/2) (Cb^(1/2) Ca Cb^(1/2))^(-1/2) Cb^(1/2) is the optimal map between the centred Gaussians; I - T is the
    derivative of the distance by Ca. Needs n > d, for Ca to be of full rank.
    """
    x = torch.as_tensor(features).double()
    a = Gaussian.of(x)
    _same_size(a, b)
    root = _power(b.covariance, 0.5)
    gradient = torch.eye(len(a.mean), dtype=torch.float64) - root @ _power(root @ a.covariance @ root, -0.5) @ root
    centred = x - a.mean
    linear = 2 * centred @ (a.mean - b.mean) + ((centred @ gradient) * centred).sum(1)
    return (linear - linear.mean()).numpy()


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a positive semidefinite matrix; zero eigenvalues stay zero."""
    values, vectors = torch.linalg.eigh(matrix)
    smallest = SMALLEST * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    powers = torch.where(values > smallest, values.clamp_min(smallest).pow(exponent), torch.zeros_like(values))
    return (vectors * powers) @ vectors.T


def _same_size(a: Gaussian, b: Gaussian) -> None:
    if a.mean.shape != b.mean.shape:
        raise MixDQError(f"features have {len(a.mean)} and {len(b.mean)} dimensions, expected the same")
