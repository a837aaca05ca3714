"""Tensor parallelism for attention and feed-forward: each process holds and computes a shard of the packed weights.

    torch.distributed.init_process_group(...)
    tensor_parallel(pipe.unet)      # the same call in every process, after quantizing or loading

Projections into heads and hidden features are sharded by output rows, projections back by input columns, and each
attention and feed-forward ends with one all-reduce (Megatron-LM, arXiv 1909.08053, section 3). Integer codes, scales,
zero points and BOS rows are sharded with the weight; activation ranges are replicated, so that every process quantizes
its part as one process would, and the result differs only by the rounding of that sum.

To choose layers by hand use torch's ``parallelize_module`` with ``ColwiseParallel`` and ``RowwiseParallel``, which
makes DTensors of quantized weights (see ``quantize.collectives``). It shards rows consecutively, whereas this module
shards each half of a gated feed-forward and adapts the attention's number of heads.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..compat import uncompiled
from ..errors import QuantizationError
from ..quantize.tensor import MixDQTensor, SplitMixDQTensor
from ..quantize.tensor_ops import sliced


def tensor_parallel(model: nn.Module, group: dist.ProcessGroup | None = None) -> list[str]:
    """Shards the ``Attention`` and ``FeedForward`` blocks of a diffusers model over ``group``, in place.

    All other layers are replicated. Returns the names of the sharded blocks.

    Raises:
        QuantizationError: heads or hidden features of a block cannot be divided evenly; nothing is changed.
    """
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention

    model = uncompiled(model)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, Attention | FeedForward)}
    for name, block in blocks.items():
        _check(name, block, size)
    for block in blocks.values():
        if isinstance(block, Attention):
            _divide_attention(block, size, rank, group)
        else:
            _divide_feed_forward(block, size, rank, group)
    return list(blocks)


def _check(name: str, block: Any, size: int) -> None:
    if hasattr(block, "heads"):
        simple = block.group_norm is None and block.spatial_norm is None and block.add_k_proj is None
        if block.heads % size or not simple or getattr(block, "fused_projections", False):
            raise QuantizationError(
                f"{name!r} has {block.heads} heads, expected plain attention of a multiple of {size}"
            )
    elif block.net[2].in_features % size:
        raise QuantizationError(
            f"{name!r} has {block.net[2].in_features} hidden features, expected a multiple of {size}"
        )


def _divide_attention(block: Any, size: int, rank: int, group: Any) -> None:
    for layer in (block.to_q, block.to_k, block.to_v):
        keep_rows(layer, _part(layer.out_features, size, rank))
    keep_columns(block.to_out[0], size, rank, group)
    block.heads //= size


def _divide_feed_forward(block: Any, size: int, rank: int, group: Any) -> None:
    first = block.net[0].proj
    hidden = block.net[2].in_features
    part = _part(hidden, size, rank)
    halves = first.out_features // hidden  # 2 if one half gates the other
    keep_rows(first, torch.cat([part + i * hidden for i in range(halves)]))
    keep_columns(block.net[2], size, rank, group)


def _part(count: int, size: int, rank: int) -> Tensor:
    return torch.arange(count).view(size, -1)[rank]


def keep_rows(layer: nn.Linear, rows: Tensor) -> None:
    """Keeps only the output features ``rows`` (indices) of a layer, quantized or not."""
    weight: Any = layer.weight
    layer.weight = nn.Parameter(_rows(weight, rows), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[rows.to(layer.bias.device)], requires_grad=False)
    layer.out_features = len(rows)


def _rows(weight: Any, rows: Tensor) -> Tensor:
    rows = rows.to(weight.device)
    if not isinstance(weight, MixDQTensor):
        if isinstance(weight, SplitMixDQTensor):
            raise QuantizationError("a split weight is one of a convolution and cannot be divided")
        return weight.detach()[rows].clone()
    parts: dict[str, Any] = {name: tensor[rows].contiguous() for name, tensor in weight.by_row().items()}
    return weight.with_tensors(**parts)


def keep_columns(layer: nn.Linear, size: int, rank: int, group: Any) -> None:
    """Keeps only the input features of shard ``rank`` of ``size``, and sums the output over ``group``; only rank 0 adds
    the bias."""
    step = layer.in_features // size
    weight: Any = layer.weight
    if isinstance(weight, MixDQTensor):
        part: Any = sliced(weight, 1, rank * step, (rank + 1) * step).clone()
    else:
        part = weight.detach()[:, rank * step : (rank + 1) * step].clone()
    layer.weight = nn.Parameter(part, requires_grad=False)
    layer.in_features = step
    if rank > 0:
        layer.register_parameter("bias", None)

    def reduce(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return cast(Tensor, _Sum.apply(output, group))

    layer.register_forward_hook(reduce)


class _Sum(torch.autograd.Function):
    """All-reduce without a backward, in which each process would have only its own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.contiguous() if not x.requires_grad else x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise QuantizationError(
            "a gradient of blocks that tensor_parallel divided: each process has only a part of it; train with FSDP2 "
            "(fully_shard, docs/howto/parallel.md) or with parallelize_module"
        )
