"""The private names of torch that code generation uses, in one place; torch 2.11, 2.13 and 2.15 all work.

Importing this module imports Inductor, which takes seconds: eager mode has :mod:`inductor_kernels.compat_eager`.
:mod:`inductor_kernels.pretend` and :mod:`inductor_kernels.interpreted` replace more private functions, for tests.
"""

import contextlib
import logging
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, cast
from unittest import mock

import sympy
import torch
import torch.utils._triton
from torch._inductor import config, ir, select_algorithm
from torch._inductor.choices import InductorChoices
from torch._inductor.fx_passes import joint_graph, mkldnn_fusion
from torch._inductor.fx_passes.post_grad import pass_patterns
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.lowering import view as _view
from torch._inductor.pattern_matcher import Arg, CallFunction, KeywordArg, Match, PatternExpr, register_graph_pattern
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V, ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._sympy.functions import FloorDiv

from .nodes import is_our_op

__all__ = [
    "Arg",
    "CallFunction",
    "FakeTensorMode",
    "KeywordArg",
    "Match",
    "Node",
    "Operator",
    "PatternExpr",
    "Size",
    "SymbolicGridFn",
    "TritonTemplate",
    "V",
    "Value",
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
    "loader",
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

Operator: TypeAlias = torch._ops.OpOverload
Node: TypeAlias = ir.IRNode
"""A tensor of a graph that is being lowered."""
Size: TypeAlias = int | sympy.Expr
"""A dimension; an expression where it is dynamic."""
Value: TypeAlias = Any
"""An operand or a result of ``ops``: one element of a tensor in the kernel that computes it."""

if TorchVersion(torch.__version__) < "2.13":
    # Pointwise work on [B, T, N] fuses with a product [B T, N] only if its loops are merged before fusion.
    config.loop_ordering_after_fusion = False


_can_fuse_horizontal = InductorChoices.can_fuse_horizontal


def _apart(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
    """No horizontal fusion into our templates; their prologues and epilogues, which fuse vertically, remain.

    Inductor only compares the numbers of elements, and counts those of a fused prologue as the template's own.
    Pointwise work that reads the prologue's inputs would become an epilogue of the wrong size (CantSplit).
    """
    if _is_our_template(node1) or _is_our_template(node2):
        return False
    return _can_fuse_horizontal(scheduler, node1, node2, shared_data_score)


def _is_our_template(node: Any) -> bool:
    """Whether a scheduler node holds a template of this package; Inductor decides about all others."""
    template = node.get_template_node()
    return template is not None and any(map(is_our_op, template.origins))


InductorChoices.can_fuse_horizontal = staticmethod(_apart)


def triton_device(device: torch.device) -> int | None:
    """The compute capability (90 for sm_90) to generate Triton code for, None where no Triton code can be generated.

    A CPU for which Inductor generates Triton code, which the interpreter runs, counts as sm_90.
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
    """Do not compile the choices of a template in threads before they are timed, as torch does from Python 3.11.9
    on: Triton's interpreter compiles nothing."""
    with mock.patch.object(select_algorithm, "get_num_workers", lambda: 0):
        yield


def select(name: str, choices: list[Any], inputs: list[Any], layout: ir.Layout) -> Node:
    """The output node of the fastest choice.

    Choices are timed now, without epilogues. Inductor could instead decide after timing them fused
    (``return_multi_template``), but of equal fusions, as a model's equal blocks have, it then makes only one.
    ``pipeline_max_autotune_gemm`` has no timings yet at this point and needs a multi-template, so it is off here.
    """
    with config.patch(pipeline_max_autotune_gemm=False):
        result = autotune_select_algorithm(name, choices, inputs, layout, return_multi_template=False)
    return result[0] if isinstance(result, tuple) else result  # torch 2.13 returns the choice as well


def autotunes() -> bool:
    """Whether to offer Inductor several choices: it times them whenever there is more than one."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def fallback(op: Operator, *arguments: Any) -> Any:
    """Lower ``op`` to a call of the operator from the generated code."""
    return fallback_handler(op, add_to_fallback_set=False)(*arguments)


def call_python(node: Node, expression: str) -> None:
    """Make the generated code of a :func:`fallback` call the function ``expression``, without the dispatcher."""
    kernel = _buffer(node)
    kernel = kernel.inputs[0] if isinstance(kernel, ir.MultiOutput) else kernel
    if isinstance(kernel, ir.FallbackKernel) and not config.cpp_wrapper:
        kernel.python_kernel_name = expression


def rewrite(pattern: PatternExpr, check: Callable[..., bool], replace: Callable[..., None], *, stage: int) -> None:
    """Call ``replace(match, ...)`` for every match of ``pattern`` in Inductor's post-grad passes for
    which ``check(match, ...)`` holds. Further arguments of both are what the pattern's ``Arg`` and ``KeywordArg``
    matched. Stages 0 to 2 run one after the other.

    Inductor's matcher ignores keyword arguments (``alpha`` of an addition). No pattern of this package has any, so
    matches of nodes with keyword arguments are rejected."""

    def allowed(match: Match) -> bool:
        plain = not any(node.kwargs for node in match.nodes)
        return plain and check(match, *match.args, **match.kwargs)

    stages: Any = pass_patterns
    register_graph_pattern(pattern, extra_check=allowed, pass_dict=stages[stage])(replace)


def before_lowering(change: Callable[[torch.fx.Graph], int]) -> None:
    """Call ``change`` with every joint graph (forward and backward in one) of aten operators. It returns the number
    of changes it made."""
    passes: Any = joint_graph.pass_patterns
    passes.append(types.SimpleNamespace(apply=change))


def activation_patterns() -> dict[str, tuple[Callable[[PatternExpr], CallFunction], int]]:
    """Inductor's patterns of decomposed activation functions by name: (a function from the pattern of the argument to
    that of the result, how many nodes read the argument). Empty where torch is built without oneDNN."""
    names = {"gelu": ("_gelu_fusion_1", 2), "gelu_tanh": ("_gelu_fusion_2", 4), "silu": ("_silu_fusion", 2)}
    return {k: (getattr(mkldnn_fusion, name), n) for k, (name, n) in names.items() if hasattr(mkldnn_fusion, name)}


def replace_output(match: Match, op: Operator, arguments: tuple[Any, ...]) -> None:
    """Replace the nodes of a match by ``op(*arguments)``."""
    node = match.output_node()
    with match.graph.inserting_before(node):
        new = match.graph.call_function(op, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    match.erase_nodes()


def tag_caches(tag: str) -> None:
    """Make ``tag`` part of the keys of Inductor's caches, which otherwise depend on the graph but not on lowerings
    registered from outside torch."""
    torch.compiler.config.cache_key_tag += f"[{tag}]"


def generate(
    fn: Callable[..., Any], fakes: list[torch.Tensor], mode: FakeTensorMode, options: dict[str, Any]
) -> tuple[str, Any, torch.fx.GraphModule]:
    """Inductor's inference code for ``fn(*fakes)``, its ``GraphLowering``, and the traced graph. ``options`` are
    settings of ``torch._inductor.config``."""
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


def cudagraph_reasons(graph: Any, traced: torch.fx.GraphModule) -> list[str]:
    """Why Inductor would not capture a ``GraphLowering`` in one CUDA graph, that is without partitioning it."""
    from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    with config.patch(graph_partition=False):
        reasons = [graph.disable_cudagraphs_reason, check_multiple_devices_or_any_cpu_nodes(graph.device_node_mapping)]
    node = get_first_incompatible_cudagraph_node(traced)
    reasons += [node and f"operator {node.target}", graph.mutated_inputs and f"inputs {graph.mutated_inputs} change"]
    return [reason for reason in reasons if reason]


def hint(size: Size) -> int:
    """A likely value of a size, for decisions that change speed but not results."""
    sizevars = V.graph.sizevars
    if hasattr(sizevars, "optimization_hint"):
        return int(sizevars.optimization_hint(size, fallback=4096))
    return int(sizevars.size_hint(size, fallback=4096))  # pyright: ignore[reportAttributeAccessIssue]  # torch 2.11


def multiple_of(size: Size, divisor: int) -> bool:
    """Whether a size is known to be a multiple of ``divisor``, without a guard."""
    return V.graph.sizevars.statically_known_multiple_of(cast(sympy.Expr, size), divisor)


def floor_div(size: Size, divisor: int) -> Size:
    """``size // divisor``. Python's operator turns symbols into the floor of a fraction, which kernels compute in
    floating point."""
    return cast(Size, FloorDiv(size, divisor))


def passed_as_number(node: Node) -> bool:
    """Whether kernels get this tensor by value: Inductor reads CPU inputs without dimensions before the launch."""
    return V.graph.is_unspec_arg(node.get_name())


def view(x: Node, sizes: Sequence[Size]) -> Node:
    """``x`` in another shape."""
    return _view(cast(ir.TensorBox, x), cast(Sequence[sympy.Expr], sizes))


def zero(size: Size) -> bool:
    """Whether a size is known to be 0, without a guard."""
    return V.graph.sizevars.statically_known_equals(size, 0)


def aligned(x: Node, size: int) -> bool:
    """Whether every row (last dimension) of a buffer is known to begin at a multiple of ``size`` bytes."""
    layout = cast(ir.Layout, x.get_layout())
    starts = (layout.offset, *layout.stride[:-1])
    return x.get_name() not in V.graph.unaligned_buffers and all(
        multiple_of(start * layout.dtype.itemsize, size) for start in starts
    )


def zero_points(device: torch.device, dtype: torch.dtype, length: int) -> Node:
    """[256, length] activation codes whose row ``z`` holds the code of zero point ``z``; computed once per graph.
    ``dtype``: uint8, or int8 for codes minus 128."""
    known = V.graph.__dict__.setdefault("inductor_kernels_zero_points", {})
    lowest = 0 if dtype == torch.uint8 else -128

    def code(index: Sequence[sympy.Expr]) -> Value:
        return ops.to_dtype(ops.index_expr(index[0] + lowest, torch.int32), dtype)

    if (device, dtype, length) not in known:
        known[device, dtype, length] = realize_inputs(pointwise(device, dtype, code, [256, length]))
    return known[device, dtype, length]


def pointwise(
    device: torch.device, dtype: torch.dtype, element: Callable[[Sequence[sympy.Expr]], Value], size: Sequence[Size]
) -> Node:
    """A tensor of this size whose value at an index is ``element(index)``, in terms of ``ops``. It is realized:
    computed once, however many nodes read it."""
    made = ir.Pointwise.create(device=device, dtype=dtype, inner_fn=element, ranges=list(size))
    made.realize()
    return made


def loader(x: Node) -> Callable[[Sequence[Size]], Value]:
    """The function that reads one element of ``x`` in a kernel that is being generated."""
    return cast(Callable[[Sequence[Size]], Value], x.make_loader())


def contiguous(x: Node) -> Node:
    """``x`` with strides in row-major order; a copy only where its producer's layout is fixed to another order."""
    return ir.ExternKernel.require_contiguous(x)


def _buffer(x: Any) -> Any:
    """The buffer behind boxes and views."""
    while isinstance(x, (ir.MutableBox, ir.BaseView)):
        x = x.data
    return x


def computed_by_template(x: Any) -> bool:
    """Whether ``x`` is pointwise work, of any number of steps, on the result of a template: a candidate epilogue."""
    buffer = _buffer(x)
    if not isinstance(buffer, ir.ComputedBuffer) or not isinstance(buffer.data, ir.Pointwise):
        return False
    read = [V.graph.try_get_buffer(name) for name in buffer.get_read_names()]
    return any(isinstance(source, ir.TemplateBuffer) or computed_by_template(source) for source in read)


def pointwise_work(x: Node) -> tuple[int, int] | None:
    """(operations, bytes read) per element of ``x`` where it is a pointwise computation, else None.

    Smaller tensors that it reads (scales, biases) stay in a cache, so their bytes do not count.
    """
    buffer: Any = _buffer(x)
    if not isinstance(buffer, ir.ComputedBuffer) or not isinstance(buffer.data, ir.Pointwise):
        return None
    count, elements = buffer.data.inner_fn_opcount(), _elements(buffer)
    read: list[Any] = [V.graph.try_get_buffer(name) or V.graph.graph_inputs.get(name) for name in count.read_buffers]
    return count.num_ops, sum(r.get_dtype().itemsize for r in read if r is not None and _elements(r) >= elements)


def _elements(buffer: Any) -> int:
    return math.prod(hint(size) for size in buffer.get_size())


def read_by_others() -> bool:
    """Whether other nodes than the operator being lowered read its first argument."""
    read = V.graph.current_node.args[0]
    return isinstance(read, torch.fx.Node) and len(read.users) > 1


def computed_once(x: Node) -> Node:
    """``x``, the first argument of the operator being lowered, realized where other nodes read it too: each reader
    would compute it again for its own view."""
    return cast(Node, realize_inputs(x)) if read_by_others() else x


def allow_prologue(x: Node) -> None:
    """Allow Inductor to fuse the computation of ``x`` into a template as its prologue.

    It refuses prologues that read more bytes than they produce, which a quantize does, unless they are marked.
    """
    buffer = _buffer(x)
    if isinstance(buffer, ir.ComputedBuffer):
        V.graph.invoke_quant_ops.add(buffer.get_operation_name())
