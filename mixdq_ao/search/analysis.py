"""The settings of a sensitivity analysis, whatever its method: the model, its inputs, bit widths, store and workers."""

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
    """The settings of an analysis, of a model whose weights carry the smoothing and rotation of its calibration.

    Attributes:
        pipe, prompts, weight_bits, act_bits, rule, budget, store: see ``analyze``.
        calibration: of the folded model; it has no smoothing or rotation left to fold.
        roundings: as ``check_roundings`` returns them.
        moments: of the folded model's inputs.
        workers: Ray workers whose loaded models carry the same folding.
        merge, part: see ``analyze``, ``analyze_part``.
    """

    pipe: Any
    prompts: list[str]
    sampling: Sampling
    calibration: Calibration
    weight_bits: Sequence[int] = (2, 4, 8)
    act_bits: Sequence[int] = (4, 8)
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
        """Bit widths of weights and of activations, for ``settings``."""
        return [list(self.weight_bits), list(self.act_bits)]

    @property
    def choices(self) -> tuple[Calibration, Sequence[int], Sequence[int], tuple[str, ...], Mapping[str, Tensor] | None]:
        """The arguments of ``deltas_of`` after the model."""
        return self.calibration, self.weight_bits, self.act_bits, self.roundings, self.moments

    @property
    def content(self) -> list[str]:
        """Calibrated layers whose group is "content" by the ``rule``, sorted; for ``settings``."""
        known = self.calibration.layers
        return sorted(n for n in find_layers(self.model) if n in known and self.rule(n) == "content")

    def settings(self, **own: Any) -> dict[str, Any]:
        """The settings that results depend on, and a method's ``own`` ones, as JSON. Together with the pipeline they
        make the fingerprint of a store: where they change, stores on disk cannot be continued.

        Roundings are part of it unless they are PLAIN alone, moments where roundings are.
        """
        settings = {"prompts": self.prompts, "sampling": asdict(self.sampling)}
        settings["calibration"] = _calibration_key(self.calibration)
        if any(layer.split is not None for layer in self.calibration.layers.values()):
            settings["split"] = "weight and act"  # stores of older versions tried one range for both
        if self.roundings != (PLAIN,):
            settings["roundings"] = list(self.roundings)
            if self.moments is not None:
                settings["moments"] = fingerprint_of(self.moments)
        return settings | own

    def metadata(self, method: str, **own: Any) -> dict[str, Any]:
        """The metadata of the resulting Sensitivity."""
        return {"prompts": len(self.prompts), "sampling": asdict(self.sampling), "method": method, **own}

    @contextmanager
    def results(self, settings: Mapping[str, Any]) -> Iterator[Store]:
        """The open store of these settings, after merging the stores of ``merge`` into it."""
        with Store(self.store, fingerprint(self.pipe, settings)) as results:
            results.merge(self.merge)
            yield results

    def pool(
        self, here: Build[Item, Result], away: Build[Item, Result], settings: Mapping[str, Any], results: Store
    ) -> Pool[Item, Result]:
        """The pool that computes results: in this process with the function ``here`` builds, or on workers with the
        function ``away`` builds from each worker's own pipeline.

        ``away`` is pickled for the workers, so it must not refer to this analysis, which holds the pipeline.
        """
        build = here if self.workers is None else of_same_model(away, settings, results.fingerprint)
        return pool_of(self.workers, self.pipe, build)


def of_same_model(build: Build[Item, Result], settings: Mapping[str, Any], expected: str) -> Build[Item, Result]:
    """``build`` for a worker; it raises SensitivityError where the worker's pipeline is not the analyzed one."""

    def checked(pipe: Any) -> Any:
        if fingerprint(pipe, settings) != expected:
            raise SensitivityError(
                "a worker's pipeline is not the one that is analyzed (weights or configs of its components differ); "
                "make RayWorkers.load give the same weights in the same type"
            )
        return build(pipe)

    return checked


def check_covered(called: Iterable[str], calibrated: Container[str]) -> None:
    """Raises SensitivityError where a called layer was not calibrated. Layers that are never called need not be."""
    for name in called:
        if name not in calibrated:
            raise SensitivityError(
                f"layer {name!r}: is called and not in the calibration, expected every layer that these prompts and "
                "steps call; calibrate with them"
            )


def _calibration_key(calibration: Calibration) -> dict[str, Any]:
    """The fields of a calibration that results depend on."""
    return {"layers": {n: layer_to_json(v) for n, v in calibration.layers.items()}, "bos": calibration.bos_embedding}
