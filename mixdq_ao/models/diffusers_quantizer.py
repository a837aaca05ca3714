"""Our quantizer for diffusers: ``from_pretrained`` quantizes while weights stream in, or loads what was saved.

    from mixdq_ao.models import MixDQConfig
    unet = UNet2DConditionModel.from_pretrained(path, quantization_config=MixDQConfig(plan))

Registered with diffusers when ``mixdq_ao`` is imported (``registration.py``). ``save_pretrained`` then writes quantized
models, and ``from_pretrained``, of the model or of a whole pipeline, loads them without a further word.
"""

from __future__ import annotations

import re
import sys
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
from ..layers import find_layers
from ..plan import Plan
from ..quantize.heap import page_out
from ..quantize.tensor import is_quantized
from ..registration import METHOD
from .checkpoint import Checkpoint
from .declared import attributes_kept, register, remember, with_known
from .diffusers_config import MixDQConfig
from .flatten import flatten
from .fqn_config import resolve
from .joint_names import without_joint
from .plan_of import check_plan_of, plan_of

IP_ADAPTER = re.compile(r"[.]processor[.]to_[kv]_ip[.]|^encoder_hid_proj[.]image_projection_layers[.]")
# diffusers 0.39 began to ask a quantizer for plain tensors when it saves, and to give them back when it loads.
HAS_HOOKS = hasattr(DiffusersQuantizer, "get_state_dict_and_metadata")


class MixDQQuantizer(DiffusersQuantizer):
    """What diffusers asks while it loads or saves one model.

    With a model that is not quantized yet, each weight is quantized as soon as it is read, and only then the next one
    is; with a saved one, the plain tensors of each weight are put together again, in whichever file they come.
    """

    quantization_config: MixDQConfig
    use_keep_in_fp32_modules = True
    configs: Mapping[str, AOBaseConfig | None]
    checkpoint: Checkpoint

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pending: dict[str, Tensor] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            if not HAS_HOOKS:
                raise CheckpointError(
                    "diffusers before 0.39 cannot load quantized safetensors; upgrade it, or use load_quantized"
                )
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
        """Plain tensors of one file in, the weights that are whole by now out."""
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
        """Puts a weight into the model, quantizing it where it is not quantized yet."""
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
        attach_quantizer(model, plan, self)
        # The model keeps this object: what only loading needs would keep files open and be copied with the model.
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

    @property
    def is_serializable(self) -> bool:
        return HAS_HOOKS

    @property
    def is_trainable(self) -> bool:
        """Adapters are; gradients go through quantized weights, not into them."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any) -> Any:
        dequantize_layers(model)
        with attributes_kept(model):
            items = {k: v for k, v in model.config.items() if k != "quantization_config"}
            model._internal_dict = type(model.config)(items)
        return model


def dequantize_layers(model: nn.Module, *dtype: Any) -> None:
    """Weights of torchao's kind become floating-point ones, of ``dtype`` where one is given."""
    for module in find_layers(model).values():
        if isinstance(module.weight, TorchAOBaseTensor):
            weight: Any = module.weight
            module.weight = nn.Parameter(weight.dequantize(*dtype))


def attach_quantizer(model: nn.Module, plan: Plan | None = None, quantizer: MixDQQuantizer | None = None) -> None:
    """Makes diffusers or transformers know that ``model`` is quantized, so that its ``save_pretrained`` works; models
    of neither, without a quantized layer, or without values (on the meta device) are left alone.

    ``quantize_`` and loading do this by themselves. ``plan``: the plan that quantized the model, to keep its exact
    ranges and metadata; layers it does not name keep what was known of them.
    """
    weights = [m.weight for m in find_layers(model).values() if is_quantized(m.weight)]
    if not weights or any(w.is_meta for w in weights):
        return
    if isinstance(model, ModelMixin):
        plan = plan_of(model, with_known(model, plan))
        config = MixDQConfig(plan)
        quantizer = quantizer or MixDQQuantizer(config)
        quantizer.quantization_config = config
        target: Any = model
        target.hf_quantizer = quantizer
        target.quantization_method = config.quant_method
        # Left false: diffusers refuses .to(dtype) of what it takes for quantized, and our tensors can do it.
        target.is_quantized = False
        register(model, config)
        remember(model, plan)
    elif "transformers.modeling_utils" in sys.modules:
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            from .transformers_quantizer import attach_to_transformers

            attach_to_transformers(model, plan=with_known(model, plan))


def _take_types(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives the empty model the stored types, so that loading without a dtype changes none."""
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
    """Tensors that own their memory, as diffusers' way of writing wants them; only shared ones are copied."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return own


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MixDQConfig  # type: ignore[assignment]
AUTO_QUANTIZER_MAPPING[METHOD] = MixDQQuantizer
