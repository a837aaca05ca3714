"""What code generation needs of torch that is not public, in one place; torch 2.11, 2.13 and 2.15 all work.

:mod:`inductor_kernels.pretend` replaces more of them, for tests.
"""

import contextlib
import logging
import math
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.utils._triton
from torch._inductor import config, ir, select_algorithm
from torch._inductor.choices import InductorChoices
from torch._inductor.fx_passes import joint_graph, mkldnn_fusion
from torch._inductor.fx_passes.post_grad import pass_patterns
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.lowering import view as _view
from torch._inductor.pattern_matcher import Arg, CallFunction, KeywordArg, register_graph_pattern
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V, ops
from torch.torch_version import TorchVersion
from torch.utils._sympy.functions import FloorDiv

from .nodes import is_ours

__all__ = [
    "Arg",
    "CallFunction",
    "KeywordArg",
    "SymbolicGridFn",
    "TritonTemplate",
    "V",
    "activation_patterns",
    "aligned",
    "allow_prologue",
    "before_lowering",
    "call_python",
    "computed_by_template",
    "computed_once",
    "config",
    "contiguous",
    "cudagraph_reasons",
    "fallback",
    "floor_div",
    "hint",
    "ir",
    "multiple_of",
    "ops",
    "passed_as_number",
    "pointwise",
    "pointwise_work",
    "read_by_others",
    "realize_inputs",
    "register_lowering",
    "replace_output",
    "rewrite",
    "select",
    "tag_caches",
    "triton_device",
    "view",
    "without_precompiling",
    "zero",
    "zero_points",
]

log = logging.getLogger("inductor_kernels")

if TorchVersion(torch.__version__) < "2.13":
    # Pointwise work on [B, T, N] joins a product of [B T, N] only if its loops are merged before kernels are fused.
    config.loop_ordering_after_fusion = False


_can_fuse_horizontal = InductorChoices.can_fuse_horizontal


def _apart(scheduler, node1, node2, shared_data_score) -> bool:
    """One of our templates takes in what it reads and what reads it, nothing else.

    Torch asks only whether both run over as many elements, and takes those of a fused prologue for the template's
    own: pointwise work that reads what the prologue reads then ends up as an epilogue it cannot be (CantSplit).
    """
    if _ours(node1) or _ours(node2):
        return False
    return _can_fuse_horizontal(scheduler, node1, node2, shared_data_score)


def _ours(node) -> bool:
    """Whether a kernel to be has a template of this package; those of other models are fused as ever."""
    template = node.get_template_node()
    return template is not None and any(map(is_ours, template.origins))


InductorChoices.can_fuse_horizontal = staticmethod(_apart)


def triton_device(device: torch.device) -> int | None:
    """The compute capability (90 for sm_90) Triton code will run at, or None where none can be made.

    A CPU counts as the newest architecture when Inductor generates Triton for it, which the interpreter runs.
    """
    if not torch.utils._triton.has_triton_package():
        return None
    if device.type == "cpu":
        return 90 if config.cpu_backend == "triton" else None
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@contextlib.contextmanager
def without_precompiling() -> Iterator[None]:
    """From Python 3.11.9 on torch compiles the choices of a tile in threads before it times them. What Triton
    interprets has nothing to compile."""
    with mock.patch.object(select_algorithm, "get_num_workers", lambda: 0):
        yield


def select(name: str, choices: list, inputs: list, layout):
    """The fastest choice, as a node; torch 2.13 returns the choice as well.

    It is timed now, alone. Torch would also put the choice off until it has timed it with what can be fused, but of
    equal fusions, as a model's equal blocks have, it then makes one and leaves the others apart.
    """
    result = autotune_select_algorithm(name, choices, inputs, layout, return_multi_template=False)
    return result[0] if isinstance(result, tuple) else result


def autotunes() -> bool:
    """Whether several choices may be timed. With one choice nothing is; with two Inductor always times them."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def fallback(op, *arguments):
    """Leave ``op`` as a call from the generated code."""
    return fallback_handler(op, add_to_fallback_set=False)(*arguments)


def call_python(node, expression: str) -> None:
    """Have the generated code call the function that ``expression`` names, past the operator's dispatcher."""
    kernel = _buffer(node)
    kernel = kernel.inputs[0] if isinstance(kernel, ir.MultiOutput) else kernel
    if isinstance(kernel, ir.FallbackKernel) and not config.cpp_wrapper:
        kernel.python_kernel_name = expression


def rewrite(pattern, check, replace, *, stage: int) -> None:
    """In graphs about to be lowered, call ``replace(match, ...)`` for what ``pattern`` finds, where ``check(match,
    ...)`` allows it, both with what its ``Arg`` and ``KeywordArg`` stand for. Stages 0 to 2 run one after the other.

    Torch matches a node whatever its keyword arguments are (``alpha`` of an addition); no pattern here has any, and
    nodes with some are left alone."""
    plain = lambda match: not any(node.kwargs for node in match.nodes)  # noqa: E731
    allowed = lambda match: plain(match) and check(match, *match.args, **match.kwargs)  # noqa: E731
    stages: Any = pass_patterns
    register_graph_pattern(pattern, extra_check=allowed, pass_dict=stages[stage])(replace)


def before_lowering(change: Callable[[torch.fx.Graph], int]) -> None:
    """Call ``change`` with every graph of plain operators, forward and backward still in one; it returns how much it
    changed."""
    passes: Any = joint_graph.pass_patterns
    passes.append(types.SimpleNamespace(apply=change))


def activation_patterns() -> dict[str, tuple[Any, int]]:
    """Inductor's own patterns for what it makes of activation functions: (a function of the pattern of their argument,
    how often they read it). None where torch is built without oneDNN."""
    names = {"gelu": ("_gelu_fusion_1", 2), "gelu_tanh": ("_gelu_fusion_2", 4), "silu": ("_silu_fusion", 2)}
    return {k: (getattr(mkldnn_fusion, name), n) for k, (name, n) in names.items() if hasattr(mkldnn_fusion, name)}


def replace_output(match, op, arguments: tuple) -> None:
    """``op(*arguments)`` in place of what a pattern found."""
    node = match.output_node()
    with match.graph.inserting_before(node):
        new = match.graph.call_function(op, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    match.erase_nodes()


def tag_caches(tag: str) -> None:
    """Keep compiled code of other versions of these lowerings out of the way: Inductor's caches know only the graph."""
    torch.compiler.config.cache_key_tag += f"[{tag}]"


def generate(fn: Callable, fakes: list[torch.Tensor], mode, options: dict[str, Any]):
    """What Inductor makes of ``fn`` of fake tensors, without gradients: code, its graph, what was traced."""
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    traced = make_fx(fn, decomposition_table=select_decomp_table())(*fakes)
    with V.set_fake_mode(mode), config.patch(options):
        _recursive_joint_graph_passes(traced)
        _recursive_post_grad_passes(traced, is_inference=True)
        graph = GraphLowering(traced, example_inputs=fakes, shape_env=mode.shape_env or ShapeEnv(), is_inference=True)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*fakes)
            wrapper, _ = graph.codegen()
    return wrapper.value, graph, traced


def cudagraph_reasons(graph, traced: torch.fx.GraphModule) -> list[str]:
    """What makes Inductor leave CUDA graphs aside for a lowered graph, without splitting it into parts."""
    from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    with config.patch(graph_partition=False):
        reasons = [graph.disable_cudagraphs_reason, check_multiple_devices_or_any_cpu_nodes(graph.device_node_mapping)]
    node = get_first_incompatible_cudagraph_node(traced)
    reasons += [node and f"operator {node.target}", graph.mutated_inputs and f"inputs {graph.mutated_inputs} change"]
    return [reason for reason in reasons if reason]


def hint(size) -> int:
    """A likely value of a size, for decisions that change speed but not results."""
    sizevars = V.graph.sizevars
    if hasattr(sizevars, "optimization_hint"):
        return int(sizevars.optimization_hint(size, fallback=4096))
    return int(sizevars.size_hint(size, fallback=4096))  # pyright: ignore[reportAttributeAccessIssue]  # torch 2.11


def multiple_of(size, divisor: int) -> bool:
    return V.graph.sizevars.statically_known_multiple_of(size, divisor)


def floor_div(size, divisor: int) -> Any:
    """``size // divisor`` of a size: of symbols Python's own makes a fraction, whose floor kernels compute in floating
    point."""
    return FloorDiv(size, divisor)


def passed_as_number(node) -> bool:
    """Whether a kernel gets the value of this tensor: Inductor reads inputs without dimensions on the CPU first."""
    return V.graph.is_unspec_arg(node.get_name())


def view(x, sizes):
    """``x`` in another shape; ``sizes`` are numbers or symbolic expressions."""
    return _view(x, sizes)


def zero(size) -> bool:
    return V.graph.sizevars.statically_known_equals(size, 0)


def aligned(x, size: int) -> bool:
    """Whether every row (last dimension) of a buffer is known to begin at a multiple of ``size`` bytes."""
    layout = x.get_layout()
    starts = (layout.offset, *layout.stride[:-1])
    return x.get_name() not in V.graph.unaligned_buffers and all(
        multiple_of(start * layout.dtype.itemsize, size) for start in starts
    )


def zero_points(device: torch.device, dtype: torch.dtype, length: int):
    """[256, length] activation codes, every row of the zero point that is its number; computed once per graph."""
    known = V.graph.__dict__.setdefault("inductor_kernels_zero_points", {})
    lowest = 0 if dtype == torch.uint8 else -128

    def code(index):
        return ops.to_dtype(ops.index_expr(index[0] + lowest, torch.int32), dtype)

    if (device, dtype, length) not in known:
        known[device, dtype, length] = realize_inputs(pointwise(device, dtype, code, [256, length]))
    return known[device, dtype, length]


def pointwise(device: torch.device, dtype: torch.dtype, element, size):
    """A tensor of this size; ``element`` makes of an index what is there, in terms of ``ops``. Computed once, however
    many read it."""
    made = ir.Pointwise.create(device=device, dtype=dtype, inner_fn=element, ranges=list(size))
    made.realize()
    return made


def contiguous(x):
    """``x`` with its last dimension densest; free where its producer may still choose a layout."""
    return ir.ExternKernel.require_contiguous(x)


def _buffer(x) -> Any:
    while isinstance(x, (ir.MutableBox, ir.BaseView)):
        x = x.data
    return x


def computed_by_template(x) -> bool:
    """Whether ``x`` is pointwise work on the result of a template, whose epilogue it can become, or on such work."""
    buffer = _buffer(x)
    if not isinstance(buffer, ir.ComputedBuffer) or not isinstance(buffer.data, ir.Pointwise):
        return False
    read = [V.graph.try_get_buffer(name) for name in buffer.get_read_names()]
    return any(isinstance(source, ir.TemplateBuffer) or computed_by_template(source) for source in read)


def pointwise_work(x) -> tuple[int, int] | None:
    """(operations, bytes read) per element of pointwise work that nobody has computed yet, None for anything else.

    Reads of fewer elements (scales, biases) come from a cache and are not counted as bytes.
    """
    buffer: Any = _buffer(x)
    if not isinstance(buffer, ir.ComputedBuffer) or not isinstance(buffer.data, ir.Pointwise):
        return None
    count, elements = buffer.data.inner_fn_opcount(), _elements(buffer)
    read: list[Any] = [V.graph.try_get_buffer(name) or V.graph.graph_inputs.get(name) for name in count.read_buffers]
    return count.num_ops, sum(r.get_dtype().itemsize for r in read if r is not None and _elements(r) >= elements)


def _elements(buffer) -> int:
    return math.prod(hint(size) for size in buffer.get_size())


def read_by_others() -> bool:
    """Whether the operator being lowered is not the only one that reads its first argument."""
    read = V.graph.current_node.args[0]
    return isinstance(read, torch.fx.Node) and len(read.users) > 1


def computed_once(x) -> Any:
    """The first argument of the operator being lowered; computed now where others read it, which would each compute a
    view of their own."""
    return realize_inputs(x) if read_by_others() else x


def allow_prologue(x) -> None:
    """Let a template take over the computation of ``x``, although that reads more bytes than ``x`` has.

    Inductor refuses to move a quantize into its reader unless it is marked as one.
    """
    buffer = _buffer(x)
    if isinstance(buffer, ir.ComputedBuffer):
        V.graph.invoke_quant_ops.add(buffer.get_operation_name())
