"""AdamW and SGD for 16-bit parameters that step like float32 ones, without a second copy of the weights.

    optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-4)      # a model in bfloat16
    optimizer.attach(model)                                            # optional: step inside backward
    for batch in data:
        loss(model, batch).backward()
        optimizer.step()                                               # attached: only ends the pass
        optimizer.zero_grad()

The optimizer stores 16 bits for each parameter, which together with the parameter's own 16 bits are its float32 value
(``split.py``); ``fp32(parameter)`` returns it. Given the same gradients, it is bit for bit the value that
torch.optim.AdamW (``foreach=False``, the default on a CPU) gives float32 parameters. The idea is that of arXiv
2309.12381.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from ..errors import OptimizerError
from .base import MemoryEfficientOptimizer
from .options import check_number
from .rules import ADAMW, SGD


class MemoryEfficientAdamW(MemoryEfficientOptimizer):
    """AdamW (arXiv 1711.05101) on 16-bit parameters with 16-bit remainders: 4 bytes per parameter, plus its moments.

    Args:
        params: as for torch.optim.AdamW: parameters, named parameters or groups; bfloat16, float16 or float32.
        lr, betas, eps, weight_decay: as there. A tensor lr is converted to a Python float, where torch would compute
            with the rounded tensor.
        moments: "float32" (8 bytes per parameter, exact), "bfloat16" (4 bytes, dithered: see ``moments.dithered``) or
            "8bit" (2 bytes, torchao's blocks of 256, for tensors of 4096 values and more). May differ by group; a later
            change applies from each parameter's next step on.
        nonfinite: the effect of a NaN or an infinity in a gradient: "raise" OptimizerError, "skip" the step and count
            it in ``skipped``, or "propagate", as torch does (which needs no synchronization with the device).
        compile: step each tensor by one kernel from torch.compile; meant for GPUs. It uses correctly rounded square
            roots, which torch's eager operator on a CPU (MKL's) does not always give: updates then differ by a few
            parts in 10^7, moments not at all.

    Raises:
        OptimizerError: an option out of range, a parameter of another dtype.
    """

    rule = ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: str = "float32",
        nonfinite: str = "raise",
        compile: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": moments}
        super().__init__(params, defaults, nonfinite=nonfinite, compile=compile)

    def _check_group(self, options: Mapping[str, Any], where: str) -> None:
        super()._check_group(options, where)
        check_number(options["eps"], f"{where}: eps")
        betas = options["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise OptimizerError(f"{where}: betas is {betas!r}, expected two numbers")
        for i, beta in enumerate(betas):
            check_number(beta, f"{where}: betas[{i}]", below=1.0)


class MemoryEfficientSGD(MemoryEfficientOptimizer):
    """SGD with momentum on 16-bit parameters with 16-bit remainders: 4 bytes per parameter, plus its momentum.

    Args:
        lr, momentum, dampening, weight_decay, nesterov: as for torch.optim.SGD; steps equal those on float32 parameters
            (``foreach=False``) bit for bit.
        params, moments, nonfinite, compile: as for MemoryEfficientAdamW. There is no square root, so compiled steps
            give the same bits.
    """

    rule = SGD
    late = frozenset({"momentum_buffer"})

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        moments: str = "float32",
        nonfinite: str = "raise",
        compile: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "moments": moments,
        }
        super().__init__(params, defaults, nonfinite=nonfinite, compile=compile)

    def _moments(self, group: Mapping[str, Any]) -> dict[str, bool]:
        return dict(self.rule.moments) if group["momentum"] else {}

    def _check_group(self, options: Mapping[str, Any], where: str) -> None:
        super()._check_group(options, where)
        check_number(options["momentum"], f"{where}: momentum")
        check_number(options["dampening"], f"{where}: dampening")
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise OptimizerError(f"{where}: nesterov needs a momentum and no dampening")

    def _check_late(self, missing: Collection[str], group: Mapping[str, Any], name: str) -> None:
        if "momentum_buffer" in missing and group["dampening"]:
            raise OptimizerError(
                f"{name}: momentum begins after its first step, expected dampening=0 then; give both from the start"
            )
