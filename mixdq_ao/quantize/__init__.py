"""Quantized weights as tensor subclasses, their operators, and the quantization of models."""

from . import collectives, fsdp, tensor_ops, transposed  # noqa: F401  (register operators)
