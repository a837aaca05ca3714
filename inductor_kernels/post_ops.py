"""Fuses epilogues of products on a CPU into oneDNN's kernels ("post-ops"), which saves a pass over the result.

    linear(...) + other                                ->   linear_post(..., other)
    GELU or SiLU of linear(...)                        ->   linear_post(..., activation)
    uint8 codes of linear(...), or of its GELU, SiLU   ->   linear_post(..., out_inv_scale, out_zero_point)

where the product runs in oneDNN's int8 kernels and nothing else reads the intermediate results. Codes pass from layer
to layer without a floating-point tensor in memory; they are computed from the unrounded float32 result, whatever the
model's type. Convolutions are not fused: oneDNN adds to their results only in place.

Measured on an EPYC (Zen 3, no VNNI), one thread, 4-bit weights, float32: linear, activation, quantize, linear of 1024 x
640 -> 2560 -> 640 run 1.04 (GELU) and 1.02 (SiLU, no activation) times as fast, without a float tensor of 10 MB; of 256
x 3072 -> 12288 -> 3072, where nearly all time goes to the products, as fast as before. With VNNI (Zen 5), one thread,
8-bit weights: the first 1.10 (GELU), 1.03 (SiLU) and 1.01 (none); with 4096 rows, where 40 MB are not written, 1.6 and
more in float32 and 1.13 and 1.06 in bfloat16; the second 1.03 and 1.00.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import compat, onednn, routes
from .checks import FLOATS
from .compat import Arg, CallFunction, KeywordArg, Match, PatternExpr
from .patterns import PRODUCT, convert, linear

OPS = torch.ops.inductor_kernels
aten = torch.ops.aten


def _in_onednn(x: torch.Tensor, y: torch.Tensor, row_scale: torch.fx.Node | None, bits: int) -> bool:
    """Whether oneDNN computes the product ``y`` of codes ``x``; False where their sizes are symbolic."""
    if y.device.type != "cpu" or compat.config.cpu_backend != "cpp" or row_scale is not None:
        return False
    return all(type(n) is int for n in x.shape) and routes.repays_onednn(x.numel() * y.shape[-1], bits)


def _values(match: Match, *nodes: torch.fx.Node) -> list[Any]:
    """The fake tensors of a match's output and of ``nodes``."""
    return [node.meta["val"] for node in (match.output_node(), *nodes)]


def _adds(match: Match, *product: Any, other: Any) -> bool:
    """Whether the product and ``other`` have one shape, and a type that oneDNN writes."""
    codes, *_, row_scale, bits, dtype = product
    if not isinstance(other, torch.fx.Node):
        return False
    y, x, z = _values(match, codes, other)
    alike = z.shape == y.shape and z.dtype == dtype and y.dtype == dtype
    return alike and onednn.writes(dtype) and _in_onednn(x, y, row_scale, bits)


def _add(match: Match, *product: Any, other: Any) -> None:
    compat.replace_output(match, OPS.linear_post.default, (*product, other, "none", None, None))


def _register_sums() -> None:
    for operands in ((linear(), KeywordArg("other")), (KeywordArg("other"), linear())):
        compat.rewrite(CallFunction(aten.add.Tensor, *operands), _adds, _add, stage=2)


def _gates(activation: torch.fx.Node) -> bool:
    """Whether an activation is multiplied by another tensor of its size: the generated code of that product computes
    the activation at no extra cost."""
    for user in activation.users:
        factors = [a.meta["val"].shape for a in user.args if isinstance(a, torch.fx.Node)]
        if user.target is aten.mul.Tensor and factors == [user.meta["val"].shape] * 2:
            return True
    return False


def _register_activation(name: str, of: Callable[[PatternExpr], CallFunction], readers: int) -> None:
    """``of``: from the pattern of an argument, which ``readers`` nodes read, to that of the activation. 16-bit results
    are converted to float32 for it; where codes are made of the activation it need not be converted back."""

    def activates(match: Match, *product: Any, dtype: torch.dtype | None = None) -> bool:
        codes, *_, row_scale, bits, _ = product
        y, x = _values(match, codes)
        pays = y.dtype in FLOATS and routes.repays_activation(name) and not _gates(match.output_node())
        return pays and _in_onednn(x, y, row_scale, bits)

    def activate(match: Match, *product: Any, dtype: torch.dtype | None = None) -> None:
        (y,) = _values(match)
        compat.replace_output(match, OPS.linear_post.default, (*product[:-1], y.dtype, None, name, None, None))

    widened = of(CallFunction(convert, linear(), torch.float32, _users=readers))
    for pattern in (of(linear(readers)), widened, CallFunction(convert, widened, KeywordArg("dtype"))):
        compat.rewrite(pattern, activates, activate, stage=1)


def _quantizes(match: Match, *product: Any, inv_scale: Any, zero_point: Any, activation: str = "none") -> bool:
    if not isinstance(inv_scale, torch.fx.Node) or not isinstance(zero_point, torch.fx.Node):
        return False
    codes, *_, row_scale, bits, _ = product
    y, x, scale, zero = _values(match, codes, inv_scale, zero_point)
    scalars = (scale.shape, scale.dtype, zero.shape, zero.dtype) == ((), torch.float32, (), torch.int32)
    return scalars and _in_onednn(x, y, row_scale, bits)


def _quantize(match: Match, *product: Any, inv_scale: Any, zero_point: Any, activation: str = "none") -> None:
    post = (torch.float32, None, activation, inv_scale, zero_point)
    compat.replace_output(match, OPS.linear_post.default, (*product[:-1], *post))


def _register_codes() -> None:
    """Codes in the form that ``reference.quantize`` traces to, with ``levels=255``."""
    args = [Arg() for _ in range(PRODUCT)]
    activated = CallFunction(OPS.linear_post.default, *args, None, KeywordArg("activation"), None, None)
    for y in (linear(), activated):
        for x in (y, CallFunction(convert, y, torch.float32)):
            scaled = CallFunction(aten.mul.Tensor, x, KeywordArg("inv_scale"))
            codes = CallFunction(aten.round.default, CallFunction(aten.add.Tensor, scaled, KeywordArg("zero_point")))
            clamped = CallFunction(aten.clamp_max.default, CallFunction(aten.clamp_min.default, codes, 0), 255)
            compat.rewrite(CallFunction(convert, clamped, torch.uint8), _quantizes, _quantize, stage=2)


def register() -> None:
    _register_sums()
    for name, (of, readers) in compat.activation_patterns().items():
        _register_activation(name, of, readers)
    _register_codes()
