"""Ahead-of-time compilation of a quantized model to one ``.pt2`` file that a process without this library can run.

    package(pipe.unet, kwargs, "unet.pt2")           # here
    torch._inductor.aoti_load_package("unet.pt2")    # anywhere with the same torch; no import of ours

The weights in a package are the packed integers. On a GPU our Triton kernels are compiled into it. On a CPU our kernels
are Python and C that only a Python process with ``inductor_kernels`` has, so by default a package for a CPU contains
plain torch operators instead: weights are unpacked and multiplied in float32, which loses the speed of integer products
(not the memory, nor more accuracy than float32 sums have). ``use="ours"`` keeps the calls to our operators, which is
faster. Calls also remain where our Triton kernels do not apply: a grouped convolution, a weight without its sum. A
process must ``import inductor_kernels`` before it loads a package with such calls; ``package`` returns whether it has
any.
"""

from __future__ import annotations

import copy
import os
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from inductor_kernels import ops as _ops  # noqa: F401  (registers torch.ops.inductor_kernels)
from inductor_kernels import reference

from ..compat import compile_package, uncompiled
from ..errors import CheckpointError
from ..layers import find_layers
from ..quantize.tensor import is_quantized

kernels = torch.ops.inductor_kernels
Kernels = Literal["auto", "ours", "plain"]


@torch.no_grad()
def export(
    model: nn.Module, kwargs: Mapping[str, Any], *, plain: bool = False, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """``torch.export`` of a quantized model: a graph over the plain tensors of its weights.

    Args:
        model: a module with quantized layers; not changed.
        kwargs: arguments of its ``forward``; other shapes need ``dynamic_shapes`` (as in ``torch.export``).
        plain: replaces our operators by plain torch ones, so that a process without this library can run the graph.
    """
    model = copy.deepcopy(uncompiled(model)).eval().requires_grad_(False)
    for module in model.modules():
        module.__dict__.pop("layer_plan", None)
    program = torch.export.export(model, (), dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
    # This also replaces each weight by the plain tensors it holds.
    return program.run_decompositions(dict(PLAIN) if plain else {})


def package(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    use: Kernels = "auto",
    dynamic_shapes: Any = None,
) -> bool:
    """Compiles a quantized model ahead of time into one file. Returns whether it calls our operators, for which a
    process must import ``inductor_kernels``.

    Args:
        model, kwargs, dynamic_shapes: as for ``export``.
        path: a file name that ends in ``.pt2``; an existing file is overwritten.
        use: "auto" uses our kernels on a GPU and plain torch operators on a CPU; "ours" and "plain" force one.

    Raises:
        CheckpointError: the file name does not end in ``.pt2``, the model has no quantized layer, or the package would
            call our operators and torch is older than 2.13.
    """
    path = os.fspath(path)
    if not path.endswith(".pt2"):
        raise CheckpointError(f"{path}: expected a file name that ends in .pt2")
    layers = [m for m in find_layers(model).values() if is_quantized(m.weight)]
    if not layers:
        raise CheckpointError(f"{type(model).__name__} holds no quantized layer; quantize it first")
    on_cpu = layers[0].weight.device.type == "cpu"
    plain = use == "plain" or (use == "auto" and on_cpu)
    if on_cpu and not plain:
        _check_calls()
    program = export(model, kwargs, plain=plain, dynamic_shapes=dynamic_shapes)
    compile_package(program, path)
    if calls := _calls_ours(path):
        _check_calls()
    return calls


def _check_calls() -> None:
    """Raises CheckpointError if this torch's packages cannot call our operators."""
    if TorchVersion(torch.__version__) < "2.13":
        raise CheckpointError(
            f"packages of torch {torch.__version__} hand operators of others the wrong types, expected torch 2.13 or "
            "newer; or use='plain'"
        )


def _calls_ours(path: str) -> bool:
    """Whether a package calls our operators: torch lists operators that it calls by name in JSON files beside the
    code."""
    with zipfile.ZipFile(path) as file:
        lists = [name for name in file.namelist() if name.endswith(".json")]
        return any(b'"inductor_kernels::' in file.read(name) for name in lists)


def captured_call(model: nn.Module, run: Callable[[], object]) -> dict[str, Any]:
    """The arguments, by name, of the first call of ``model`` in ``run``.

    Raises:
        CheckpointError: ``run`` does not call it.
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


PLAIN: dict[Any, Callable[..., Tensor]] = {
    operator: partial(function, sums=torch.float32)
    for operator, function in (
        (kernels.linear.default, reference.linear),
        (kernels.conv2d.default, reference.conv2d),
        (kernels.linear_weight_only.default, reference.linear_weight_only),
        (kernels.conv2d_weight_only.default, reference.conv2d_weight_only),
    )
}
"""{our operator: its implementation by plain torch operators}."""
