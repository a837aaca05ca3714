"""Whose operator a node of a graph calls."""

import torch


def namespace(node: torch.fx.Node) -> str:
    """Of the operator that a node calls; empty for a node that calls none."""
    return getattr(node.target, "namespace", "")


def is_ours(node: torch.fx.Node) -> bool:
    """Whether a node calls an operator of this package."""
    return namespace(node) == "inductor_kernels"
