"""MixDQTensor: the weight of a quantized linear or convolution layer, holding packed integers only."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from inductor_kernels import ops as _ops  # noqa: F401  (registers torch.ops.inductor_kernels)
from inductor_kernels.packing import pack, unpack, unpack_weight

from ..compat import wrapper
from .quantizer import ActQuant, WeightQuant, act_bits, quantize_weight, scaled
from .shared import key, share


class _Parameters(type(TorchAOBaseTensor)):
    """Lets ``type(parameter)(tensor, requires_grad=...)`` make a parameter of a tensor of that class, as nn.Parameter
    does: accelerate's offloading restores weights in this way."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], cls) and set(kwargs) <= {"requires_grad"}:
            return torch.nn.Parameter(args[0], requires_grad=False)
        return super().__call__(*args, **kwargs)


class MixDQTensor(TorchAOBaseTensor, metaclass=_Parameters):
    """A weight of 8, 4 or 2 bits with, optionally, static activation quantization and BOS handling.

    Logical shape [N, K] (linear) or [O, C / groups, kh, kw] (convolution). Stored:

    Attributes:
        qdata: int8 [N, K] / [O, kh, kw, C] at 8 bits, else uint8 with the last dimension packed
            (``inductor_kernels.packing``).
        scale: float32 [N], weight scale times activation scale (weight scale alone with 16-bit activations).
        weight_zero_point: int8 [N], None at 8 bits.
        weight_sum: int32 [N], sum of the signed integers of a channel; None on a CPU, where it is computed once when
            the weight is prepacked. Kernels elsewhere take it as an argument.
        act_scale, act_inv_scale: float32 []; act_zero_point: int32 []. None with 16-bit activations.
        bos_embedding: float32 [K]; bos_output: [N] in the layer's type. None without BOS.
        bits: 8, 4 or 2. length: elements of the last stored dimension before packing (K or C / groups).
        act_levels: largest activation code (255 or 15), None with 16-bit activations.
        shared_key: a digest of ``shared_tensors``, None where they hold no values (on the meta device).

    Weights with equal ``shared_tensors`` hold the same objects (see ``shared``): never change them in place.
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["bits", "length", "dtype"]
    optional_tensor_data_names = [
        "weight_zero_point",
        "weight_sum",
        "act_scale",
        "act_inv_scale",
        "act_zero_point",
        "bos_embedding",
        "bos_output",
    ]
    optional_tensor_attribute_names = ["act_levels", "shared_key"]
    shared_tensors = ("act_scale", "act_inv_scale", "act_zero_point", "bos_embedding")
    row_tensors = ("qdata", "scale", "weight_zero_point", "weight_sum", "bos_output")

    qdata: Tensor
    scale: Tensor
    weight_zero_point: Tensor | None
    weight_sum: Tensor | None
    act_scale: Tensor | None
    act_inv_scale: Tensor | None
    act_zero_point: Tensor | None
    bos_embedding: Tensor | None
    bos_output: Tensor | None
    bits: int
    length: int
    act_levels: int | None
    shared_key: str | None

    @staticmethod
    def __new__(
        cls, qdata: Tensor, scale: Tensor, bits: int, length: int, dtype: torch.dtype, *optional: Any, **named: Any
    ):
        """The arguments are those of ``__init__``; only shape, type and device matter here."""
        stored = qdata.shape
        shape = (stored[0], length, *stored[1:-1])
        return wrapper(cls, shape, dtype=dtype, device=qdata.device)

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        bits: int,
        length: int,
        dtype: torch.dtype,
        weight_zero_point: Tensor | None = None,
        weight_sum: Tensor | None = None,
        act_scale: Tensor | None = None,
        act_inv_scale: Tensor | None = None,
        act_zero_point: Tensor | None = None,
        bos_embedding: Tensor | None = None,
        bos_output: Tensor | None = None,
        act_levels: int | None = None,
        shared_key: str | None = None,
    ):
        super().__init__()
        self.qdata, self.scale, self.bits, self.length = qdata, scale, bits, length
        self.weight_zero_point, self.weight_sum = weight_zero_point, weight_sum
        self.act_scale, self.act_inv_scale = share(act_scale), share(act_inv_scale)
        self.act_zero_point, self.bos_embedding = share(act_zero_point, act_scale), share(bos_embedding)
        self.bos_output, self.act_levels = bos_output, act_levels
        self.shared_key = shared_key or key(*(getattr(self, name) for name in self.shared_tensors))
        optional = [name for name in self.optional_tensor_data_names if getattr(self, name) is not None]
        self._flat = [*self.tensor_data_names, *optional], self.attributes()

    def attributes(self) -> dict[str, object]:
        """The constructor's arguments other than tensors."""
        names = (*self.tensor_attribute_names, *self.optional_tensor_attribute_names)
        return {name: getattr(self, name) for name in names}

    def take_shared_key(self, source: MixDQTensor) -> None:
        """Copies the digest of ``source``, whose ``shared_tensors`` this weight has taken over."""
        self.shared_key = source.shared_key
        self._flat = self._flat[0], self.attributes()

    def __tensor_flatten__(self):
        """As inherited, but computed once: torch.compile calls this for every weight at every call."""
        return self._flat

    @classmethod
    def __metadata_guard__(cls, traced: dict[str, object], other: dict[str, object]) -> bool:
        """Ignores ``shared_key``: compiled code accepts any values of ``shared_tensors``, and torch.compile guards
        which of them are the same object."""
        return traced == other or all(traced[name] == other[name] for name in traced if name != "shared_key")

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        bits: int = 8,
        *,
        symmetric: bool | None = None,
        act: ActQuant | None = None,
        bos_embedding: Tensor | None = None,
    ) -> MixDQTensor:
        """Quantizes a floating-point weight [N, K] or [O, C / groups, kh, kw].

        ``act``: static activation parameters, None for 16-bit activations. ``bos_embedding`` [K]: input rows equal to
        it give ``weight @ bos_embedding``, computed here in float64.

        Raises:
            QuantizationError: the weight or the bits cannot be used (see ``quantize_weight``).
        """
        return cls.from_codes(
            quantize_weight(weight, bits, symmetric=symmetric),
            bits,
            weight.dtype,
            act=act,
            bos_embedding=bos_embedding,
            bos_output=None if bos_embedding is None else bos_row(weight, bos_embedding),
        )

    @classmethod
    def from_codes(
        cls,
        quant: WeightQuant,
        bits: int,
        dtype: torch.dtype,
        *,
        act: ActQuant | None = None,
        bos_embedding: Tensor | None = None,
        bos_output: Tensor | None = None,
    ) -> MixDQTensor:
        """Packs weight codes that have been computed already."""
        codes = quant.codes.movedim(1, -1).contiguous()
        device = codes.device
        return cls(
            codes if bits == 8 else pack(codes, bits),
            quant.scale if act is None else quant.scale * act.scale,
            bits,
            codes.shape[-1],
            dtype,
            weight_zero_point=quant.zero_point,
            weight_sum=None if device.type == "cpu" or act is None else _row_sums(quant.integers()),
            act_scale=None if act is None else torch.tensor(act.scale, dtype=torch.float32, device=device),
            act_inv_scale=None if act is None else torch.tensor(act.inv_scale, dtype=torch.float32, device=device),
            act_zero_point=None if act is None else torch.tensor(act.zero_point, dtype=torch.int32, device=device),
            bos_embedding=bos_embedding,
            bos_output=bos_output,
            act_levels=None if act is None else act.levels,
        )

    @property
    def act(self) -> tuple[Tensor, Tensor, int] | None:
        """(inverse scale, zero point, largest code) of the input; None with 16-bit activations."""
        if self.act_inv_scale is None or self.act_zero_point is None or self.act_levels is None:
            return None
        return self.act_inv_scale, self.act_zero_point, self.act_levels

    def codes(self) -> Tensor:
        """The unpacked codes, one per element, with channels last as in ``qdata``: int8 at 8 bits, else uint8."""
        return self.qdata if self.bits == 8 else unpack(self.qdata, self.bits, self.length)

    def integers(self) -> Tensor:
        """Signed int8 weight values in the logical shape: codes minus zero point."""
        values = (
            self.qdata if self.bits == 8 else unpack_weight(self.qdata, self.weight_zero_point, self.bits, self.length)
        )
        return values.movedim(-1, 1)

    def weight_scale(self) -> Tensor:
        """float32 [N]: the weight is weight_scale * integers."""
        return self.scale if self.act_scale is None else self.scale / self.act_scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """(integers, weight_scale)."""
        return self.integers(), self.weight_scale()

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The weight in floating point, in the logical shape."""
        return scaled(*self.factors()).to(output_dtype or self.dtype)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The plain tensors this weight holds, by attribute name."""
        return {name: getattr(self, name) for name in self.__tensor_flatten__()[0]}

    def by_row(self) -> dict[str, Tensor]:
        """The stored tensors whose first dimension is the output features."""
        return {name: tensor for name, tensor in self.stored_tensors().items() if name in self.row_tensors}

    def with_tensors(self, *, length: int | None = None, **changed: Tensor) -> MixDQTensor:
        """A copy with some tensors replaced; ``length``: the new number of input features, where it changes."""
        tensors: dict[str, Any] = {**self.stored_tensors(), **changed}
        attributes: dict[str, Any] = self.attributes() | ({} if length is None else {"length": length})
        if changed.keys() & set(self.shared_tensors):
            attributes["shared_key"] = None  # computed anew, which reads the values off the device
        return MixDQTensor(**tensors, **attributes)

    def _stable_hash_for_caching(self) -> str:
        """A hash of all that compiled code depends on, so that processes that quantize alike share a compilation.

        It includes the values of ``shared_tensors``: which weights share them is compiled into the graph.
        """
        return stable_hash(self, self.bits, self.length, self.act_levels, self.shared_key)

    def describe(self) -> str:
        return f"W{self.bits}A{act_bits(self.act_levels)}" + (" BOS" if self.bos_output is not None else "")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"MixDQTensor({self.describe()}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def bos_row(weight: Tensor, embedding: Tensor) -> Tensor:
    """weight [N, K] @ embedding [K] in float64, rounded to the weight's type."""
    return (weight.detach().double() @ embedding.to(weight.device).double()).to(weight.dtype)


def _row_sums(integers: Tensor) -> Tensor:
    return integers.flatten(1).sum(1, dtype=torch.int32)


class SplitMixDQTensor(TorchAOBaseTensor, metaclass=_Parameters):
    """The weight of a convolution whose input is a concatenation of two tensors: each half of the weight has its own
    scales and input range.

    Attributes:
        first, second: MixDQTensor [O, split, kh, kw] and [O, C - split, kh, kw].
    """

    tensor_data_names = ["first", "second"]
    tensor_attribute_names = ["dtype"]

    first: MixDQTensor
    second: MixDQTensor

    @staticmethod
    def __new__(cls, first: MixDQTensor, second: MixDQTensor, dtype: torch.dtype):
        shape = (first.shape[0], first.shape[1] + second.shape[1], *first.shape[2:])
        return wrapper(cls, shape, dtype=dtype, device=first.device)

    def __init__(self, first: MixDQTensor, second: MixDQTensor, dtype: torch.dtype):
        super().__init__()
        self.first, self.second = first, second

    @property
    def split(self) -> int:
        return self.first.shape[1]

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The weight in floating point, in the logical shape."""
        return torch.cat([self.first.dequantize(output_dtype), self.second.dequantize(output_dtype)], 1)

    def stored_tensors(self) -> dict[str, Tensor]:
        halves = (("first", self.first), ("second", self.second))
        return {f"{half}.{n}": t for half, tensor in halves for n, t in tensor.stored_tensors().items()}

    def _stable_hash_for_caching(self) -> str:
        halves = (self.first._stable_hash_for_caching(), self.second._stable_hash_for_caching())
        return stable_hash(self, self.split, *halves)

    def describe(self) -> str:
        return f"{self.first.describe()} split at {self.split}"

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return (
            f"SplitMixDQTensor({self.describe()}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
        )


def stable_hash(weight: MixDQTensor | SplitMixDQTensor, *attributes: object) -> str:
    """A hash of types, shapes, strides, devices and attributes, the same in every process."""
    layout = [(n, t.dtype, tuple(t.shape), t.stride(), t.device.type) for n, t in weight.stored_tensors().items()]
    text = repr((type(weight).__name__, weight.dtype, attributes, layout))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_quantized(weight: object) -> bool:
    """Whether a layer's weight is a MixDQTensor or SplitMixDQTensor."""
    return isinstance(weight, MixDQTensor | SplitMixDQTensor)
