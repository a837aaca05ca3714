"""The optimizer's step inside backward: a gradient is used as soon as it is complete, and freed (arXiv 2309.12381).

Autograd calls a parameter's post-accumulate-grad hook once its gradient is complete, so a tied weight steps once.
Stepping moves the parameter's version counter: if a later part of the same backward needs the old values, autograd
raises an error instead of using the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import OptimizerError
from .clip import make_clip
from .gradients import finite_everywhere, is_finite, refuse_sparse, square_norm, wide_square_norm
from .loss_scale import LossScale

if TYPE_CHECKING:
    from .base import MemoryEfficientOptimizer


class InBackward:
    """The hooks of one optimizer on one model; made by ``MemoryEfficientOptimizer.attach``.

    Attributes:
        names: the model's names of the optimizer's parameters.
        loss_scale: as given.
    """

    def __init__(
        self,
        optimizer: MemoryEfficientOptimizer,
        model: nn.Module,
        *,
        max_norm: float | None,
        clip: str,
        loss_scale: LossScale | None,
    ) -> None:
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.loss_scale = loss_scale
        self._optimizer = optimizer
        self._clip = make_clip(clip, max_norm)
        self._done: set[Tensor] = set()
        self._overflowed = self._paused = False
        params = [p for _, p in optimizer._parameters()]
        _check_model(model, params, self.names)
        self._handles = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in params if p.requires_grad]

    def remove(self) -> None:
        """Removes the hooks; ``step()`` steps again."""
        for handle in self._handles:
            handle.remove()
        if self._optimizer._hooks is self:  # not a later attach()'s
            self._optimizer._hooks = None

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Inside the block gradients accumulate as usual; the first backward after it uses the sums.

        They accumulate in the gradients' own dtype, as in any model of that dtype::

            with handle.accumulating():
                loss(first_half).backward()
            loss(second_half).backward()
            optimizer.step()
        """
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def end_pass(self) -> None:
        """Steps parameters that still have a gradient (their hook was not called), and prepares the next pass.

        Raises:
            OptimizerError: as ``step``, for those parameters.
        """
        if self._optimizer._amp("grad_scale"):
            raise OptimizerError(
                "torch.amp.GradScaler cannot unscale gradients that are used inside backward; "
                "pass a LossScale to attach() and call its scale(loss).backward(), then optimizer.step()"
            )
        for _, p in self._optimizer._parameters():
            if p.grad is not None:
                self._step(p)
        if self._clip is not None and self._done:
            self._clip.end_pass(self._done, self._optimizer.state)
        if self.loss_scale is not None and (self._done or self._overflowed):
            self.loss_scale.end_pass(self._overflowed)
        self.forget_pass()

    def forget_pass(self) -> None:
        self._done.clear()
        self._overflowed = False
        if self._clip is not None:
            self._clip.forget_pass()

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        if not self._paused:
            self._step(p)

    def _step(self, p: Tensor) -> None:
        o = self._optimizer
        name = o.name_of(p)
        if p in self._done:
            raise OptimizerError(
                f"{name}: a second gradient before step(), after the first was used. Accumulate with "
                "`with handle.accumulating():` around all but the last backward; checkpoint activations with "
                "use_reentrant=False, so that a weight used in several blocks has one gradient"
            )
        if p.grad is None:
            raise OptimizerError(f"{name}: its gradient is gone already; is a second optimizer attached to it?")
        if p.grad.layout is not torch.strided:
            refuse_sparse(p.grad, name)
        square = None if self._clip is None else square_norm(p.grad, p)
        if (square is None or not math.isfinite(square)) and not self._is_usable(p, name):
            p.grad = None
            self._overflowed = True
            o.skipped += 1
            self._done.add(p)
            return
        factor = 1.0 if self.loss_scale is None else 1.0 / self.loss_scale.value
        if self._clip is not None and square is not None:
            o._state_of(p)
            square = square if math.isfinite(square) else wide_square_norm(p.grad, p)
            factor *= self._clip.factor(p, square * factor**2, o.state)
        o._apply(o._group_of(p), p, factor)
        p.grad = None
        self._done.add(p)

    def _is_usable(self, p: Tensor, name: str) -> bool:
        """Whether the gradient is finite, or non-finite ones are propagated. Raises OptimizerError if
        nonfinite="raise"."""
        policy = self._optimizer.defaults["nonfinite"]
        if self.loss_scale is None and policy == "propagate":
            return True
        assert p.grad is not None
        if finite_everywhere([(p, is_finite(p.grad))]):
            return True
        if self.loss_scale is None and policy == "raise":
            raise OptimizerError(
                f"{name}: the gradient has NaN or infinite values; it was not used, but {len(self._done)} parameters "
                "before it in this backward have made their step. Go back to the last checkpoint, or leave such "
                'gradients out with nonfinite="skip"'
            )
        return False


def _check_model(model: nn.Module, params: Sequence[Tensor], names: dict[Tensor, str]) -> None:
    if strange := [p for p in params if p not in names]:
        raise OptimizerError(
            f"attach: a parameter {list(strange[0].shape)} of the optimizer is not in the model; "
            "attach the model whose parameters the optimizer was made with"
        )
    ours = set(params)
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise OptimizerError(
                f"attach: {name or 'the model'} is in DistributedDataParallel, which averages gradients after they are "
                "complete; use fully_shard, or step() without attach"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight in ours:
            raise OptimizerError(f"attach: {name} makes sparse gradients; build the embedding with sparse=False")
