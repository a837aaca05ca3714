"""torchao's safetensors form of tensor subclasses (``torchao.prototype.safetensors``), extended to MixDQTensor.

torchao stores a subclass as its plain tensors, named ``<module>._<parameter>_<attribute>``, and its other attributes as
JSON in the file's metadata. torchao has no function to register a class, so this module changes its two tables of known
classes; ``flatten_tensor_state_dict`` and ``unflatten_tensor_state_dict`` then accept a MixDQTensor. The form cannot
express a SplitMixDQTensor, which holds two subclasses: ``flatten.py`` stores its halves separately.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor
from torchao.prototype.safetensors import safetensors_utils as torchao_utils
from torchao.utils import TorchAOBaseTensor

from ..quantize.tensor import MixDQTensor

Record = dict[str, Any]  # {"_type": class, "_data": {attribute: value}, "_tensor_data_names": [attribute]}
MIXDQ_ATTRIBUTES = ("bits", "length", "dtype", "act_levels")  # the others follow from these and the tensors
PLAIN: Record = {"_type": "Tensor"}


def accept_mixdq_tensors() -> None:
    """Registers MixDQTensor with torchao's helpers. May be called again."""
    torchao_utils.ALLOWED_CLASSES["MixDQTensor"] = MixDQTensor
    if "MixDQTensor" not in torchao_utils.ALLOWED_TENSORS_SUBCLASSES:
        torchao_utils.ALLOWED_TENSORS_SUBCLASSES.append("MixDQTensor")


def known(kind: str) -> bool:
    """Whether torchao's form covers a class of this name."""
    return kind in torchao_utils.ALLOWED_TENSORS_SUBCLASSES


def record_of(tensor: TorchAOBaseTensor) -> tuple[Record, dict[str, Tensor]]:
    """The stored parts of a subclass: a record of its attributes, and its plain tensors by attribute name."""
    record = json.loads(json.dumps(tensor, cls=torchao_utils.TensorSubclassAttributeJSONEncoder))
    if isinstance(tensor, MixDQTensor):
        record["_data"] = {name: record["_data"][name] for name in MIXDQ_ATTRIBUTES}
    return record, {name: getattr(tensor, name) for name in record["_tensor_data_names"]}


def rebuild(record: Record, parts: dict[str, Tensor]) -> Tensor:
    """Builds the subclass from its record and tensors, which are not copied. Only classes in torchao's table are built.

    Raises:
        ValueError, TypeError: the record does not fit its class.
    """
    return torchao_utils.object_from_dict({**record, "_data": {**record["_data"], **parts}})


def part_key(name: str, attribute: str) -> str:
    """The key of ``attribute`` of the parameter ``name``: "a.weight", "scale" -> "a._weight_scale"."""
    module, _, parameter = name.rpartition(".")
    return f"{module}{'.' if module else ''}_{parameter}_{attribute}"


accept_mixdq_tensors()
