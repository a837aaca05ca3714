"""A plan as diffusers' ``quantization_config``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

from ..errors import CheckpointError, PlanError
from ..plan import Plan
from ..quantize.config import check_model, mixdq_config, overridden
from ..registration import METHOD
from .flatten import FORMAT, VERSION, check_version


class Method(StrEnum):
    MIXDQ = METHOD


class MixDQConfig(QuantizationConfigMixin):
    """A plan as diffusers' ``quantization_config``, and as ``config.json`` keeps it.

    Attributes:
        plan: a Plan, or the path of a plan file.
        overrides: as in ``mixdq_config``; used while quantizing. The config stores only the plan; what overrides
            quantized is stored with the weights.
        moments: as in ``mixdq_config``, or the path of a file written by ``Moments.save`` (each matrix is read together
            with its layer): needed to quantize by a plan with a rounding of "compensated" or a weight_range of
            "output". Not stored.
    """

    def __init__(
        self,
        plan: Plan | str | os.PathLike[str],
        *,
        overrides: Mapping[str, AOBaseConfig | None] | None = None,
        moments: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    ) -> None:
        self.quant_method: Any = Method.MIXDQ
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        self.overrides = dict(overrides or {})
        self.moments = _loaded(moments)

    def layer_configs(self, model: nn.Module) -> Mapping[str, AOBaseConfig | None]:
        """The torchao config of each layer of ``model``, whose weights are not loaded yet.

        Raises PlanError or QuantizationError naming a layer that the plan does not fit, or whose moment is missing.
        """
        self._check_moments()
        config = mixdq_config(self.plan, overrides=self.overrides, moments=self.moments)
        check_model(model, config)
        return config.fqn_to_config

    def _check_moments(self) -> None:
        needed = [n for n, layer in self.plan.layers.items() if layer.quantized and layer.needs_moment]
        decided = overridden(self.overrides)
        for name in needed:
            if name in (self.moments or {}) or decided(name):
                continue
            layer = self.plan.layers[name]
            count = "" if len(needed) == 1 else f" (and {len(needed) - 1} more)"
            raise PlanError(
                f"layer {name!r}{count}: weight_range is {layer.weight_range!r} and rounding {layer.rounding!r}, but "
                "there is no second moment of its input; give MixDQConfig(plan, moments=...) what input_moments() "
                "collected of this model, or the file it was saved to"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads the ``quantization_config`` of a ``config.json``; called by diffusers."""
        config = cls.from_document("quantization_config", config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_document(cls, where: object, document: dict[str, Any]) -> MixDQConfig:
        """Reads a ``quantization_config``. ``where``: its file, for errors. Raises CheckpointError."""
        check_version(where, document)
        if set(document) != {"quant_method", "format", "version", "plan"}:
            raise CheckpointError(f"{where}: quantization_config has {sorted(document)}, expected a plan; save again")
        try:
            return cls(Plan.from_embedded(document["plan"]))
        except PlanError as e:
            raise CheckpointError(f"{where}: the plan in quantization_config is damaged: {e}; save again") from e

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format": FORMAT, "version": VERSION, "plan": self.plan.to_json()}

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def __repr__(self) -> str:
        return f"MixDQConfig(plan of {len(self.plan.layers)} layers, {len(self.overrides)} overrides)"


def _loaded(moments: Mapping[str, Tensor] | str | os.PathLike[str] | None) -> Mapping[str, Tensor] | None:
    if moments is None or isinstance(moments, Mapping):
        return moments
    from ..search.moments_file import read_moments

    return read_moments(moments)[0]
