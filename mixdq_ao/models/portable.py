"""Packages of compiled code: a quantized model as one ``.pt2`` file that a process without this library can run.

    package(pipe.unet, kwargs, "unet.pt2")           # here
    torch._inductor.aoti_load_package("unet.pt2")    # anywhere with the same torch; no import of ours

The weights in a package are the packed integers. On a GPU our Triton kernels are compiled into it. On a CPU our kernels
are Python and C that only a Python process with ``inductor_kernels`` has, so by default a package for a CPU holds plain
torch operators instead: weights are unpacked and multiplied in float32, which costs the speed of integer products (not
the memory, nor more accuracy than float32 sums have). ``use="ours"`` keeps the calls: faster, and the process must
``import inductor_kernels`` before it loads the package.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inductor_kernels import ops as _ops  # noqa: F401  (registers torch.ops.inductor_kernels)
from inductor_kernels.packing import unpack_weight

from ..errors import CheckpointError
from ..layers import find_layers, uncompiled
from ..quantize.tensor import is_quantized

kernels = torch.ops.inductor_kernels
Kernels = Literal["auto", "ours", "plain"]


@torch.no_grad()
def export(
    model: nn.Module, kwargs: Mapping[str, Any], *, plain: bool = False, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """``torch.export`` of a quantized model: a graph over the plain tensors of its weights.

    Args:
        model: a module with quantized layers; it stays as it is.
        kwargs: what its ``forward`` is called with; other shapes need ``dynamic_shapes`` (as in ``torch.export``).
        plain: plain torch operators in the place of ours, so that a process without this library can run the graph.
    """
    model = copy.deepcopy(uncompiled(model)).eval().requires_grad_(False)
    for module in model.modules():
        module.__dict__.pop("layer_plan", None)
    program = torch.export.export(model, (), dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
    # This also takes the weights apart into the tensors they hold.
    return program.run_decompositions(dict(PLAIN) if plain else {})


def package(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    use: Kernels = "auto",
    dynamic_shapes: Any = None,
) -> bool:
    """Compiles a quantized model ahead of time into one file. Returns whether a process needs ``inductor_kernels``.

    Args:
        model, kwargs, dynamic_shapes: as for ``export``.
        path: the file, named ``.pt2``; overwritten.
        use: "auto" puts our kernels in on a GPU and plain torch operators on a CPU; "ours" and "plain" force one.

    Raises:
        CheckpointError: a name that is not ``.pt2``, or a model without a quantized layer.
    """
    path = os.fspath(path)
    if not path.endswith(".pt2"):
        raise CheckpointError(f"{path}: expected a file name that ends in .pt2")
    layers = [m for m in find_layers(model).values() if is_quantized(m.weight)]
    if not layers:
        raise CheckpointError(f"{type(model).__name__} holds no quantized layer; quantize it first")
    on_cpu = layers[0].weight.device.type == "cpu"
    plain = use == "plain" or (use == "auto" and on_cpu)
    program = export(model, kwargs, plain=plain, dynamic_shapes=dynamic_shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    return on_cpu and not plain


def captured_call(model: nn.Module, run: Callable[[], object]) -> dict[str, Any]:
    """What ``model`` is called with, by name, when ``run`` calls it for the first time.

    Raises:
        CheckpointError: it was not called.
    """
    import inspect

    found: list[dict[str, Any]] = []
    names = list(inspect.signature(model.forward).parameters)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not found:
            found.append({**dict(zip(names, args, strict=False)), **kwargs})

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    if not found:
        raise CheckpointError(f"{type(model).__name__} was not called")
    return found[0]


# The operators in plain torch, in float32. Sums of products of codes are exact below 2**24, else rounded.


def _centered(x_q: Tensor, zero_point: Tensor) -> Tensor:
    shift = 128 if x_q.dtype == torch.int8 else 0
    return x_q.to(torch.float32) - (zero_point - shift).to(torch.float32)


def _finish(total: Tensor, scale: Tensor, row_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = total * scale
    if row_scale is not None:
        y = y * row_scale.unsqueeze(-1)
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


def _convolved(x: Tensor, w: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    weight = w.to(torch.float32).permute(0, 3, 1, 2)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, *geometry).permute(0, 2, 3, 1)


def _linear(x_q, weight, zero, weight_sum, scale, zero_point, bias, row_scale, bits, out_dtype):
    w = unpack_weight(weight, zero, bits, x_q.shape[-1]).to(torch.float32)
    return _finish(F.linear(_centered(x_q, zero_point), w), scale, row_scale, bias, out_dtype)


def _conv2d(x_q, weight, zero, weight_sum, scale, zero_point, bias, bits, stride, padding, dilation, groups, out_dtype):
    w = unpack_weight(weight, zero, bits, x_q.shape[-1] // groups)
    total = _convolved(_centered(x_q, zero_point), w, (stride, padding, dilation, groups))
    return _finish(total, scale, None, bias, out_dtype)


def _linear_weight_only(x, weight, zero, scale, bias, bits):
    w = unpack_weight(weight, zero, bits, x.shape[-1]).to(torch.float32)
    return _finish(F.linear(x.to(torch.float32), w), scale, None, bias, x.dtype)


def _conv2d_weight_only(x, weight, zero, scale, bias, bits, stride, padding, dilation, groups):
    w = unpack_weight(weight, zero, bits, x.shape[-1] // groups)
    total = _convolved(x.to(torch.float32), w, (stride, padding, dilation, groups))
    return _finish(total, scale, None, bias, x.dtype)


PLAIN: dict[Any, Callable[..., Tensor]] = {
    kernels.linear.default: _linear,
    kernels.conv2d.default: _conv2d,
    kernels.linear_weight_only.default: _linear_weight_only,
    kernels.conv2d_weight_only.default: _conv2d_weight_only,
}
