"""Quantized weights as tensors, what is done with them, and how a model gets them."""

from . import collectives, fsdp, tensor_ops, transposed  # noqa: F401  (register the operators of the tensors)
