"""Makes diffusers refuse to save models prepared for a precision per step: they have no file format."""

from __future__ import annotations

from typing import Any, NoReturn

from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ..errors import CheckpointError


class PreparedQuantizer(DiffusersQuantizer):
    """The quantizer of a model prepared for a schedule, which holds the weights of every level and cannot be saved."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Does nothing: such models are not loaded."""

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
    """Makes diffusers refuse to save ``model``, which was prepared for a schedule."""
    if isinstance(model, ModelMixin):
        target: Any = model
        target.hf_quantizer = PreparedQuantizer(None)  # type: ignore[arg-type]


def check_saveable(model: nn.Module) -> None:
    """Raises CheckpointError for a model prepared for a schedule."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, PreparedQuantizer):
        quantizer.refuse()
