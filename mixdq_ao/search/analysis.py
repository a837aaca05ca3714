"""What a sensitivity analysis is asked for, whatever its method: a model, its inputs, what is tried, and by whom."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import SensitivityError
from ..layers import GroupRule, find_layers, group_of
from ..models.pipelines import Sampling
from .calibration import Calibration, layer_to_json
from .distributed import Build, Item, Pool, RayWorkers, Result, pool_of
from .fingerprint import fingerprint
from .moments_file import fingerprint_of
from .part import WHOLE, Part
from .roundings import PLAIN
from .store import Store
from .watch import denoiser_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """An analysis of a model that is as it was calibrated: with its inputs folded, where the calibration says so.

    Attributes:
        pipe, prompts, weight_bits, act_bits, rule, budget, store: see ``analyze``.
        calibration: of the model as it is now, nothing left to fold.
        roundings: as ``check_roundings`` gives them.
        moments: of the inputs as they are now.
        workers: who fold what they load.
        merge, part: see ``analyze``, ``analyze_part``.
    """

    pipe: Any
    prompts: list[str]
    sampling: Sampling
    calibration: Calibration
    weight_bits: Sequence[int]
    act_bits: Sequence[int]
    roundings: tuple[str, ...] = (PLAIN,)
    moments: Mapping[str, Tensor] | None = None
    rule: GroupRule = group_of
    budget: int = 4 << 30
    store: str | os.PathLike[str] | None = None
    merge: tuple[str | os.PathLike[str], ...] = ()
    part: Part = WHOLE
    workers: RayWorkers | None = None

    @property
    def model(self) -> nn.Module:
        return denoiser_of(self.pipe)

    @property
    def bits(self) -> list[list[int]]:
        """Of weights and of activations, for ``settings``."""
        return [list(self.weight_bits), list(self.act_bits)]

    @property
    def choices(self) -> tuple[Calibration, Sequence[int], Sequence[int], tuple[str, ...], Mapping[str, Tensor] | None]:
        """What ``deltas_of`` takes after the model."""
        return self.calibration, self.weight_bits, self.act_bits, self.roundings, self.moments

    @property
    def content(self) -> list[str]:
        """Calibrated layers that the ``rule`` judges as content, sorted; for ``settings``."""
        known = self.calibration.layers
        return sorted(n for n in find_layers(self.model) if n in known and self.rule(n) == "content")

    def settings(self, **own: Any) -> dict[str, Any]:
        """What results depend on besides the pipeline, and what a method adds of its ``own``, as JSON: with the
        pipeline, the fingerprint of a store. Stores on disk continue only where it stays as it is.

        Roundings count where they are not plain alone, moments where roundings count.
        """
        settings = {"prompts": self.prompts, "sampling": asdict(self.sampling)}
        settings["calibration"] = _calibration_key(self.calibration)
        if any(layer.split is not None for layer in self.calibration.layers.values()):
            settings["split"] = "weight and act"  # activations once were tried with one range for both halves
        if self.roundings != (PLAIN,):
            settings["roundings"] = list(self.roundings)
            if self.moments is not None:
                settings["moments"] = fingerprint_of(self.moments)
        return settings | own

    def metadata(self, method: str, **own: Any) -> dict[str, Any]:
        """What a Sensitivity says about how it was made."""
        return {"prompts": len(self.prompts), "sampling": asdict(self.sampling), "method": method, **own}

    @contextmanager
    def results(self, settings: Mapping[str, Any]) -> Iterator[Store]:
        """The store of these settings, open, with the results of the stores to merge."""
        with Store(self.store, fingerprint(self.pipe, settings)) as results:
            results.merge(self.merge)
            yield results

    def pool(
        self, here: Build[Item, Result], away: Build[Item, Result], settings: Mapping[str, Any], results: Store
    ) -> Pool[Item, Result]:
        """Makes results of items with what ``here`` builds, or with what ``away`` builds of each worker's own pipeline.

        ``away`` is sent to the workers: it must not hold this analysis, which has the pipeline.
        """
        build = here if self.workers is None else of_same_model(away, settings, results.fingerprint)
        return pool_of(self.workers, self.pipe, build)


def of_same_model(build: Build[Item, Result], settings: Mapping[str, Any], expected: str) -> Build[Item, Result]:
    """``build``, for a worker: what it loaded must be the pipeline that is analyzed. Raises SensitivityError."""

    def checked(pipe: Any) -> Any:
        if fingerprint(pipe, settings) != expected:
            raise SensitivityError(
                "a worker's pipeline is not the one that is analyzed (weights or configs of its components differ); "
                "make RayWorkers.load give the same weights in the same type"
            )
        return build(pipe)

    return checked


def check_covered(called: Iterable[str], calibrated: Container[str]) -> None:
    """Raises SensitivityError where a layer is called that was not calibrated. Those never called need not be."""
    for name in called:
        if name not in calibrated:
            raise SensitivityError(
                f"layer {name!r}: is called and not in the calibration, expected every layer that these prompts and "
                "steps call; calibrate with them"
            )


def _calibration_key(calibration: Calibration) -> dict[str, Any]:
    """What results depend on of it."""
    return {"layers": {n: layer_to_json(v) for n, v in calibration.layers.items()}, "bos": calibration.bos_embedding}
