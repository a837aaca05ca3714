"""Our quantizer for diffusers: ``from_pretrained`` quantizes while it reads weights, or loads a quantized model.

    from mixdq_ao.models import MixDQConfig
    unet = UNet2DConditionModel.from_pretrained(path, quantization_config=MixDQConfig(plan))

Registered with diffusers when ``mixdq_ao`` is imported (``registration.py``). ``save_pretrained`` then writes quantized
models, and ``from_pretrained``, of the model or of a whole pipeline, loads them without further arguments.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, quantize_
from torchao.utils import TorchAOBaseTensor

from ..errors import CheckpointError
from ..plan import Plan
from ..quantize.described import describe_layers
from ..quantize.heap import page_out
from ..registration import METHOD
from .checkpoint import Checkpoint
from .declared import attributes_kept, declare, dequantize_layers, holds_quantized, register, with_known
from .diffusers_config import MixDQConfig
from .flatten import flatten
from .fqn_config import resolve
from .joint_names import without_joint
from .plan_of import check_plan_of, plan_of

IP_ADAPTER = re.compile(r"[.]processor[.]to_[kv]_ip[.]|^encoder_hid_proj[.]image_projection_layers[.]")


class MixDQQuantizer(DiffusersQuantizer):
    """The hooks that diffusers calls while it loads or saves one model.

    From full-precision files, each weight is quantized before the next one is read. From files of a quantized model,
    each weight is assembled from its plain tensors, whichever file they are in.
    """

    quantization_config: MixDQConfig
    use_keep_in_fp32_modules = True
    is_serializable = True  # type: ignore[assignment]
    is_trainable = True  # type: ignore[assignment]  # adapters; gradients pass through quantized weights, not into them
    is_compileable = True  # type: ignore[assignment]
    configs: Mapping[str, AOBaseConfig | None]
    checkpoint: Checkpoint

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pending: dict[str, Tensor] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            _take_types(model, self.checkpoint)
        else:
            self.configs = self.quantization_config.layer_configs(model)
        register(model, self.quantization_config)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        if not self.pre_quantized:
            return loaded_keys
        self.checkpoint = Checkpoint(Path(file) for file in checkpoint_files)
        return self.checkpoint.names

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized and missing_keys:
            files = ", ".join(str(h.path) for h in self.checkpoint.headers)
            raise CheckpointError(f"{files}: {min(missing_keys)!r} is missing; save the model again")
        return missing_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Takes the plain tensors of one file and returns the weights that are complete by now."""
        if not self.pre_quantized:
            return state_dict
        self.pending.update(state_dict)
        contents, whole = self.checkpoint.contents, {}
        for name in contents.names:
            keys = contents.keys(name)
            if all(key in self.pending for key in keys):
                whole[name] = self.checkpoint.assemble(name, self.pending)
                for key in keys:
                    del self.pending[key]
        return whole

    @property
    def supports_parallel_loading(self) -> bool:
        return not self.pre_quantized  # a weight's tensors may lie in two files

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        if self.pre_quantized:
            return isinstance(param_value, TorchAOBaseTensor)
        return resolve(self.configs, param_name)[1] is not None

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        if current_param.shape != loaded_param.shape:
            raise CheckpointError(
                f"{param_name!r} has shape {list(loaded_param.shape)}, the model expects {list(current_param.shape)}"
            )
        return True

    def create_quantized_param(
        self, model: Any, param_value: Any, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Puts a weight into the model, quantizing it unless it was loaded quantized."""
        layer, _, parameter = param_name.rpartition(".")
        module = model.get_submodule(layer)
        value = param_value.to(target_device)
        module._parameters[parameter] = nn.Parameter(value, requires_grad=not isinstance(value, TorchAOBaseTensor))
        if self.pre_quantized:
            return
        key, config = resolve(self.configs, param_name)
        if key == "parameter":
            quantize_(module, FqnToConfig(OrderedDict({parameter: config})), filter_fn=None)
        elif config is not None:
            quantize_(module, config, filter_fn=lambda m, _: m is module)
        page_out(param_value)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pending:
            raise CheckpointError(f"{min(self.pending)!r} is part of a weight whose other parts were not given")
        plan = self.quantization_config.plan
        if self.pre_quantized:
            check_plan_of("quantization_config", plan, dict(model.named_parameters()))
        attach_to_diffusers(model, plan, self)
        describe_layers(model)
        # The model keeps this object: drop what only loading needs, which would keep files open and be copied with it.
        self.configs = {}
        vars(self).pop("checkpoint", None)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if not safe_serialization:
            raise CheckpointError("a quantized model is saved as safetensors, not as pickle: safe_serialization=True")
        for name in state_dict:
            if ".base_layer." in name:
                raise CheckpointError(f"{name!r} has adapters; call pipe.unload_lora_weights() before saving")
            if IP_ADAPTER.search(name):
                raise CheckpointError(f"{name!r} is of an IP-Adapter; call pipe.unload_ip_adapter() before saving")
        flat = flatten(without_joint(state_dict))
        return _unshared(flat.tensors), flat.metadata()

    def _dequantize(self, model: Any) -> Any:
        dequantize_layers(model)
        with attributes_kept(model):
            items = {k: v for k, v in model.config.items() if k != "quantization_config"}
            model._internal_dict = type(model.config)(items)
        return model


def attach_to_diffusers(model: nn.Module, plan: Plan | None = None, quantizer: MixDQQuantizer | None = None) -> None:
    """Lets diffusers save and load ``model``, a diffusers model with quantized layers; does nothing to other modules.

    ``plan`` as for ``declare_quantized``; ``quantizer``: the one that loaded the model, None for a new one.
    """
    if isinstance(model, ModelMixin) and holds_quantized(model):
        config = MixDQConfig(plan_of(model, with_known(model, plan)))
        declare(model, quantizer or MixDQQuantizer(config), config)
        register(model, config)


def _take_types(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives the empty model the stored dtypes, so that loading without a dtype does not convert tensors."""
    for name, slot in list(model.state_dict(keep_vars=True).items()):
        stored = checkpoint.dtype(name)
        if stored is not None and stored != slot.dtype:
            layer, _, key = name.rpartition(".")
            module = model.get_submodule(layer)
            empty = torch.empty(slot.shape, dtype=stored, device="meta")
            if key in module._parameters:
                module._parameters[key] = nn.Parameter(empty, requires_grad=slot.requires_grad)
            else:
                module._buffers[key] = empty


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as diffusers' writer requires; only shared ones are copied."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return own


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MixDQConfig  # type: ignore[assignment]
AUTO_QUANTIZER_MAPPING[METHOD] = MixDQQuantizer
