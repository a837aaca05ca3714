"""Our quantizer for transformers: saves and loads quantized text encoders, with a pipeline or by themselves.

    quantize_(pipe.text_encoder, mixdq_config(Plan.uniform(pipe.text_encoder, 8, 16)))
    pipe.save_pretrained("pipeline")

The files are those of ``save_quantized``; ``load_quantized`` reads them too. With
``quantization_config=MixDQConfig(plan)``, ``from_pretrained`` quantizes each weight as soon as it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from ..errors import CheckpointError
from ..plan import Plan
from ..quantize.described import describe_layers
from ..quantize.tensor import MixDQTensor
from ..registration import METHOD
from .checkpoint import Checkpoint
from .declared import declare, dequantize_layers, holds_quantized, with_known
from .diffusers_config import MixDQConfig
from .flatten import flatten
from .fqn_config import resolve
from .plan_of import plan_of
from .skeleton import without_aliases
from .torchao_safetensors import part_key


class MixDQTransformersQuantizer(HfQuantizer):
    """The hooks that transformers calls while it loads or saves one model."""

    quantization_config: Any
    configs: dict[str, AOBaseConfig | None]
    checkpoint: Checkpoint | None = None
    is_trainable = True  # type: ignore[assignment]  # adapters; gradients pass through quantized weights, not into them
    is_compileable = True  # type: ignore[assignment]

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            self.checkpoint = Checkpoint(Path(file) for file in checkpoint_files or ())
            return
        self.configs = dict(self.quantization_config.layer_configs(model))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and resolve(self.configs, param_name)[1] is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]
        """The keys of the plain tensors that a weight is stored as."""
        attributes = MixDQTensor.tensor_data_names + MixDQTensor.optional_tensor_data_names
        return {"weight": [part_key("weight", attribute) for attribute in attributes]} if self.pre_quantized else {}

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Assemble}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Drop our conversions: saving would apply their inverse.
        model._weight_conversions = [c for c in model._weight_conversions or [] if not _ours(c)] or None
        self.checkpoint, self.configs = None, {}
        _declare(model, self, MixDQConfig(plan_of(model)))
        describe_layers(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        flat = flatten(without_aliases(model))
        if flat.splits:
            raise CheckpointError(f"{flat.splits[0]!r} is split, which transformers cannot store; use save_quantized")
        return flat.tensors, flat.metadata()

    def is_serializable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dequantize_layers(model, dtype)
        return model


class _Quantize(ConversionOps):
    """Quantizes a weight as soon as it is read."""

    def __init__(self, quantizer: MixDQTransformersQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        model, name, missing = kwargs["model"], kwargs["full_layer_name"], kwargs["missing_keys"]
        value = next(iter(input_dict.values()))
        layer, _, parameter = name.rpartition(".")
        module = model.get_submodule(layer)
        module._parameters[parameter] = nn.Parameter(value[0] if isinstance(value, list) else value)
        config = resolve(self.hf_quantizer.configs, name)[1]
        if config is not None:
            quantize_(module, config, filter_fn=lambda m, _: m is module)
        module.weight._is_hf_initialized = True
        missing.discard(name)
        return {}


class _Assemble(ConversionOps):
    """Assembles a quantized weight from its plain tensors."""

    def __init__(self, quantizer: MixDQTransformersQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        model, name = kwargs["model"], kwargs["full_layer_name"]
        checkpoint = self.hf_quantizer.checkpoint
        assert checkpoint is not None
        prefix = name.rpartition(".")[0]
        parts = {f"{prefix}.{key}": tensors[0] for key, tensors in input_dict.items()}
        weight = checkpoint.assemble(name, parts)
        asked = model.get_parameter(name).dtype
        return {name: nn.Parameter(weight.to(asked) if weight.dtype != asked else weight, requires_grad=False)}


def _ours(conversion: Any) -> bool:
    return any(isinstance(operation, _Assemble) for operation in getattr(conversion, "operations", ()))


def attach_to_transformers(model: nn.Module, plan: Plan | None = None) -> None:
    """Lets transformers save and load ``model``, a transformers model with quantized layers; does nothing to other
    modules. ``plan`` as for ``declare_quantized``."""
    if isinstance(model, PreTrainedModel) and holds_quantized(model):
        config: Any = MixDQConfig(plan_of(model, with_known(model, plan)))
        _declare(model, MixDQTransformersQuantizer(config, pre_quantized=True), config)


def _declare(model: Any, quantizer: MixDQTransformersQuantizer, config: MixDQConfig) -> None:
    declare(model, quantizer, config)
    model.config.quantization_config = config


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MixDQConfig  # type: ignore[assignment]
AUTO_QUANTIZER_MAPPING[METHOD] = MixDQTransformersQuantizer  # type: ignore[assignment]
