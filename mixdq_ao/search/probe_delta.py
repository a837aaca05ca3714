"""The change of one layer's own output at every bit width, weight or activation, which a probe is multiplied with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MixDQError, SensitivityError
from ..expect import located
from ..layers import find_layers
from ..plan_check import check_layer
from ..progress import progress
from ..quantize.bos import bos_mask
from ..quantize.config import MixDQLayerConfig, fake_quantizer
from ..quantize.fake import FakeQuantizer
from ..quantize.quantizer import refuse_unusable
from .calibration import Calibration
from .evaluation import Evaluation
from .roundings import PLAIN, usable


class LayerDeltas:
    """The changes of one layer's output when its weight or input is rounded in each given way, as fake mode rounds.

    As in real mode, both parts of a split input have scales of their own, and rows that equal the BOS embedding are not
    rounded.

    Args:
        module: a linear or convolution layer in floating point.
        choices: what to quantize, and how; all of them name this layer.
        embedding: the BOS embedding [K] on the model's device, or None.
        moment: second moment of the layer's input, for choices that need it.

    The codes of weights are kept, a byte a weight and choice, unless the rounding is PLAIN: those are computed again.

    Raises:
        MixDQError: the layer cannot be quantized as asked, or was not calibrated.
    """

    def __init__(
        self,
        module: nn.Linear | nn.Conv2d,
        choices: Sequence[Evaluation],
        calibration: Calibration,
        embedding: Tensor | None,
        moment: Tensor | None = None,
    ) -> None:
        self.module, self.choices = module, tuple(choices)
        self.bos: Tensor | None = None
        self.quantizers: list[FakeQuantizer] = []
        with located(f"layer {self.choices[0].name!r}", MixDQError):
            refuse_unusable(module.weight)
            for choice in self.choices:
                self._add(choice, calibration, embedding, moment)

    def _add(
        self, choice: Evaluation, calibration: Calibration, embedding: Tensor | None, moment: Tensor | None
    ) -> None:
        plan = choice.layer(calibration)
        check_layer(self.module, plan)
        config = MixDQLayerConfig(plan, "fake", embedding if plan.bos else None, choice.name, moment)
        self.quantizers.append(fake_quantizer(config))
        if choice.rounding != PLAIN:
            self.quantizers[-1].keep(self.module.weight)
        if plan.bos:
            self.bos = self.quantizers[-1].bos_embedding

    @torch.no_grad()
    def stack(self, x: Tensor, groups: int) -> Tensor:
        """The change of the layer's output for the input ``x``, for every choice.

        Returns:
            float32 [groups, choices, elements of the output / groups]; the output is cut along its first dimension.
        """
        module, x = self.module, x.detach()
        weight, rounded = module.weight.detach().float(), []
        for choice, quantizer in zip(self.choices, self.quantizers, strict=True):
            if choice.kind == "weight":
                change = self._apply(x.float(), quantizer.weight(module.weight.detach()).float() - weight)
            else:
                change = self._apply(quantizer.input(x).float() - x.float(), weight)
            rounded.append(change)
        if self.bos is not None:
            mask = bos_mask(x, self.bos)
            rounded = [change.masked_fill(mask, 0.0) for change in rounded]
        return torch.stack([change.reshape(groups, -1) for change in rounded], 1)

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.module, nn.Linear):
            return F.linear(x, weight)
        return self.module._conv_forward(x, weight, None)


def deltas_of(
    model: nn.Module,
    calibration: Calibration,
    weight_bits: Sequence[int],
    act_bits: Sequence[int],
    roundings: Sequence[str] = (PLAIN,),
    moments: Mapping[str, Tensor] | None = None,
) -> dict[str, LayerDeltas]:
    """The deltas of every calibrated layer of ``model``: its weight at each of ``weight_bits`` in each of the
    ``roundings`` it can be given, its input at each of ``act_bits``. Raises SensitivityError where no bit widths
    are given, or where moments are needed and missing."""
    if not weight_bits and not act_bits:
        raise SensitivityError("weight_bits and act_bits are both empty, expected at least one bit width")
    bos = calibration.bos_tensor(next(model.parameters()).device)
    layers = {name: module for name, module in find_layers(model).items() if name in calibration.layers}
    deltas = {}
    with progress("rounding weights", len(layers)) if tuple(roundings) != (PLAIN,) else nullcontext() as bar:
        for name, module in layers.items():
            ways = usable(roundings, name, module, moments)
            choices = [Evaluation(name, "weight", bits, rounding) for bits in weight_bits for rounding in ways]
            choices += [Evaluation(name, "act", bits) for bits in act_bits]
            moment = None if moments is None else moments.get(name)
            deltas[name] = LayerDeltas(module, choices, calibration, bos, moment)
            if bar is not None:
                bar.advance(note=name)
    return deltas
