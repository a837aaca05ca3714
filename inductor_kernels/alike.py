"""Equal work of a graph with quantized layers, done once.

Layers that read one tensor quantize it each for themselves: queries, keys and values; the text projections of all
blocks, which look for the same BOS rows as well. Inductor puts such work into one kernel where it stands together, but
writes every copy, and repeats what stands apart; torch eliminates common subexpressions of graphs for training only.
"""

import operator

import torch
from torch import Tensor, fx

from . import compat
from .nodes import is_ours, namespace


def _is_pure(node: fx.Node) -> bool:
    """Whether it computes one tensor from others, always the same, and of a size that no later node knows by name."""
    if namespace(node) not in ("aten", "prims") or not isinstance(node.meta.get("val"), Tensor):
        return False
    named_size = torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
    return bool(node.all_input_nodes) and not node.is_impure() and not named_size


def _given_out(graph: fx.Graph) -> set[fx.Node]:
    """What callers get, and what that is a view of: they may change each in place."""
    found: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if getattr(node.target, "is_view", False) or node.target is operator.getitem:  # one of several views
                waiting += node.all_input_nodes
    return found


def merge(graph: fx.Graph) -> int:
    """Has the first of equal nodes read in place of the others; how many are gone. Only in graphs with operators of
    this package."""
    if not any(map(is_ours, graph.nodes)):
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
