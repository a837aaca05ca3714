"""Common subexpression elimination in graphs with quantized layers.

Layers that read the same tensor each quantize it themselves: the query, key and value projections, and the text
projections of all blocks, which also look for the same BOS rows. Inductor fuses equal computations that are adjacent
into one kernel, which still writes every copy, and repeats those that are not adjacent. Torch eliminates common
subexpressions of training graphs only.
"""

import operator

import torch
from torch import Tensor, fx

from . import compat
from .nodes import is_our_op, namespace


def _is_pure(node: fx.Node) -> bool:
    """Whether a node deterministically computes one tensor from others, without data-dependent sizes: later nodes refer
    to such a size by the symbol of the node that made it."""
    if namespace(node) not in ("aten", "prims") or not isinstance(node.meta.get("val"), Tensor):
        return False
    named_size = torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
    return bool(node.all_input_nodes) and not node.is_impure() and not named_size


def _given_out(graph: fx.Graph) -> set[fx.Node]:
    """The graph's outputs and the tensors they are views of. Callers may change each of them in place, so none may be
    replaced by another."""
    found: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if (
                getattr(node.target, "is_view", False) or node.target is operator.getitem
            ):  # of an operator that returns several views
                waiting += node.all_input_nodes
    return found


def merge(graph: fx.Graph) -> int:
    """Replace equal nodes by the first of them and return how many were erased. Graphs without operators of this
    package are left alone."""
    if not any(map(is_our_op, graph.nodes)):
        return 0
    apart, first, merged = _given_out(graph), {}, 0
    for node in list(graph.nodes):
        if not _is_pure(node) or node in apart:
            continue
        same = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            merged += 1
    return merged


def register() -> None:
    compat.before_lowering(merge)
