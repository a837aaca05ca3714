"""Models prepared for a precision per step are not saved: no file holds what they are made of."""

from __future__ import annotations

from typing import Any, NoReturn

from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ..errors import CheckpointError


class PreparedQuantizer(DiffusersQuantizer):
    """What diffusers asks of a model prepared for a schedule: it holds every level's weights, and no file does."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Nothing is loaded into it."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    @property
    def is_serializable(self) -> bool:
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(
            "the model is prepared for a precision per step, and such weights have no file; save the original pipeline "
            "and the schedule (TemporalPlan.save), and prepare() what is loaded"
        )

    @property
    def is_trainable(self) -> bool:
        return True


def declare_prepared(model: nn.Module) -> None:
    """Has diffusers refuse to save a model prepared for a schedule."""
    if isinstance(model, ModelMixin):
        target: Any = model
        target.hf_quantizer = PreparedQuantizer(None)  # type: ignore[arg-type]


def check_saveable(model: nn.Module) -> None:
    """Raises CheckpointError for a model prepared for a schedule."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, PreparedQuantizer):
        quantizer.refuse()
