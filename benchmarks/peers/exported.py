"""PyTorch's own static quantization: export, observe, convert (torchao's pt2e) with the x86 quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .subject import Subject

BATCH = 32


class Exported(nn.Module):
    """A graph in the place of the UNet it was made from: takes the pipeline's arguments, and batches of up to 63."""

    def __init__(self, graph: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.graph = graph
        for name in ("config", "dtype", "device", "add_embedding"):  # what a pipeline asks of a UNet; not held twice
            object.__setattr__(self, name, getattr(unet, name))

    def forward(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        added = kwargs["added_cond_kwargs"]
        return self.graph(sample, timestep, kwargs["encoder_hidden_states"], added["text_embeds"], added["time_ids"])


class Positional(nn.Module):
    """A UNet whose inputs are all positional tensors."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, ids: Tensor) -> tuple[Tensor]:
        added = {"text_embeds": pooled, "time_ids": ids}
        return self.unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)


def pt2e(unet: nn.Module, subject: Subject) -> nn.Module:
    """Static 8-bit activations (histograms of the calibrating captions), 8-bit weights per channel, of every layer."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    call = subject.calls(unet, subject.calibrating[:BATCH], BATCH)[0]["inputs"]
    added = call["added_cond_kwargs"]
    inputs = (call["sample"], call["timestep"], call["encoder_hidden_states"], added["text_embeds"], added["time_ids"])
    batch = torch.export.Dim("batch", min=2, max=63)
    shapes = ({0: batch}, None, {0: batch}, {0: batch}, {0: batch})
    graph = torch.export.export(Positional(unet), inputs, dynamic_shapes=shapes).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(reduce_range=not torch.cpu._is_vnni_supported()))
    prepared = prepare_pt2e(graph, quantizer)
    subject.draw(Exported(prepared, unet), subject.calibrating)
    return Exported(without_unused(convert_pt2e(prepared)), unet)


def without_unused(graph: Any) -> nn.Module:
    """The graph without the float32 weights that quantized ones have replaced and nothing reads any more."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
    return graph
