"""The namespace of the operator that a graph's node calls."""

import torch


def namespace(node: torch.fx.Node) -> str:
    """The operator's namespace; empty for a node that calls no operator."""
    return getattr(node.target, "namespace", "")


def is_our_op(node: torch.fx.Node) -> bool:
    """Whether a node calls an operator of this package."""
    return namespace(node) == "inductor_kernels"
