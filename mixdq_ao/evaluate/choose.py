"""Creates metrics by name, with networks loaded from the user's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..errors import MixDQError
from .clip import DEFAULT, CLIPScore
from .fid import FID, Features
from .fidelity import PSNR, SSIM
from .frechet import Gaussian
from .imagereward import TOKENIZER, ImageReward
from .inception import Inception, Resize
from .lpips import LPIPS
from .metric import Metric

NAMES = ("fid", "clip", "imagereward", "lpips", "ssim", "psnr")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Locations of networks and of the statistics of real pictures. They are accessed only if a metric needs them.

    Attributes:
        inception: FID's weights, a safetensors file.
        resize: how pictures are resized for Inception (see ``Inception``).
        features: "module:function", used instead of Inception: a function from uint8 pictures [B, 3, H, W] to features
            [B, d], or a factory without arguments that returns an object with ``features(pictures in [0, 1])``.
        real: file with mean and covariance of the features of real pictures.
        clip: directory or hub name of the CLIP model.
        imagereward: ImageReward's weights, a safetensors file.
        bert: directory or hub name of ImageReward's tokenizer.
        lpips: the network of LPIPS.
        device: of all networks.
    """

    inception: Path | None = None
    resize: Resize = "tensorflow"
    features: str | None = None
    real: Path | None = None
    clip: str = DEFAULT
    imagereward: Path | None = None
    bert: str = TOKENIZER
    lpips: Literal["alex", "vgg", "squeeze"] = "alex"
    device: str = "cpu"


def choose(names: Sequence[str], sources: Sources) -> list[Metric]:
    """The metrics with these names, of ``NAMES``. Raises MixDQError naming a metric that is unknown or lacks a file."""
    unknown = next((n for n in names if n not in NAMES), None)
    if unknown is not None:
        raise MixDQError(f"metric {unknown!r} is unknown, expected some of {', '.join(NAMES)}")
    makers: dict[str, Callable[[], Metric]] = {
        "fid": lambda: _fid(sources),
        "clip": lambda: CLIPScore.load(sources.clip, sources.device),
        "imagereward": lambda: ImageReward.load(
            _needed(sources.imagereward, "imagereward", "ImageReward.pt of THUDM/ImageReward, as safetensors"),
            sources.bert,
            sources.device,
        ),
        "lpips": lambda: LPIPS.load(sources.lpips, sources.device),
        "ssim": SSIM,
        "psnr": PSNR,
    }
    return [makers[name]() for name in names]


def features_of(sources: Sources) -> tuple[Features, str]:
    """The feature function of ``fid``, and its identity."""
    if sources.features is not None:
        return _custom(sources.features), sources.features
    what = "weights-inception-2015-12-05 of torch-fidelity, as safetensors; or give other --features"
    network = Inception.load(
        _needed(sources.inception, "inception", what), resize=sources.resize, device=sources.device
    )
    return network, network.identity


def _fid(sources: Sources) -> FID:
    path = _needed(sources.real, "real", "a file of mixdq evaluate real, or an .npz with mu and sigma")
    features, identity = features_of(sources)
    return FID(features, Gaussian.load(path, identity), identity=identity)


def _needed(path: Path | None, option: str, what: str) -> Path:
    if path is None or not path.is_file():
        given = "is not given" if path is None else f"{path} is no file"
        raise MixDQError(f"--{option} {given}; expected {what}")
    return path


def _custom(spec: str) -> Features:
    """The feature function of a "module:function" (see ``Sources``). Raises MixDQError if it cannot be imported."""
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise MixDQError(f"--features is {spec!r}, expected module:function")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise MixDQError(f"--features {spec}: cannot be imported: {e}; expected module:function") from e
    if not callable(found):
        raise MixDQError(f"--features {spec}: is {type(found).__name__}, expected a function")
    made: Any = found() if _takes_nothing(found) else found
    if callable(getattr(made, "features", None)):
        return lambda images: _in_unit(made.features, images)
    return made


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments, which makes it a factory."""
    try:
        signature(function).bind()
    except TypeError:
        return False
    return True


def _in_unit(features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return features(images.float() / 255)
