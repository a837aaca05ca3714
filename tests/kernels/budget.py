"""Exact values in float64 with bounds on the error of the same computation in float32 and 16 bits.

The error of an operation is the error of its arguments times its slope, plus one rounding to float32. Roundings to
16-bit types in between are added by ``rounded``. A fused kernel rounds less often, never more often.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inductor_kernels import reference

CURVED = 0.8
"""No activation's slope changes faster: the second derivative of GELU at 0 is sqrt(2 / pi)."""

ACTIVATION = 8
"""The largest error of an activation, in float32 units of its argument. An erf of 1.5e-7 (Abramowitz and Stegun,
7.1.26) counts for half the argument; a GPU's exponential and division err by 2 ulp each. Torch's GELU on a CPU is
measured at 6.4, compiled at 4.5; SiLU and the tanh form at 2."""


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Bounded:
    """``value`` is exact; a computed one may differ from it by ``error``. Both are float64 and of one shape."""

    value: Tensor
    error: Tensor

    def rounded(self, dtype: torch.dtype) -> "Bounded":
        """After a rounding to this type, or none."""
        size = (self.value.abs() + self.error).clamp(min=torch.finfo(dtype).smallest_normal)
        return Bounded(self.value, self.error + unit(dtype) * size)

    def __add__(self, other: "Bounded | Tensor | float") -> "Bounded":
        other = known(other)
        return Bounded(self.value + other.value, self.error + other.error).rounded(torch.float32)

    def __mul__(self, other: "Bounded | Tensor | float") -> "Bounded":
        other = known(other)
        error = self.error * (other.value.abs() + other.error) + self.value.abs() * other.error
        return Bounded(self.value * other.value, error).rounded(torch.float32)

    def activated(self, name: str) -> "Bounded":
        """One of ``reference.ACTIVATIONS``. Its slope is taken at the value, and may change within the error."""
        if name == "none":
            return self
        x = self.value.clone().requires_grad_()
        with torch.enable_grad():
            y = reference.ACTIVATIONS[name](x)
            (slope,) = torch.autograd.grad(y.sum(), x)
        own = ACTIVATION * unit(torch.float32) * (self.value.abs() + self.error)
        return Bounded(y.detach(), self.error * (slope.abs() + CURVED / 2 * self.error) + own)

    def glu(self, gate: str, dtype: torch.dtype = torch.float32) -> "Bounded":
        """The first half of the columns times the activation of the second; ``dtype``: what it may be rounded to."""
        value, gates = map(Bounded, self.value.chunk(2, -1), self.error.chunk(2, -1))
        return value * gates.activated(gate).rounded(dtype)

    def layer_norm(self, eps: float = 1e-5) -> "Bounded":
        """Layer norm over the last dimension, without weight and bias.

        The mean errs by the mean error. The divisor is the distance from the mean over sqrt(n); it errs by at most the
        root mean square error, as projections do not increase distances. Sums of n numbers err by n units.
        """
        n, own = self.value.shape[-1], unit(torch.float32)
        mean, mean_error = self.value.mean(-1, keepdim=True), self.error.mean(-1, keepdim=True)
        of_mean = n * own * self.value.abs().mean(-1, keepdim=True)
        size = ((self.value - mean).square().mean(-1, keepdim=True) + eps).sqrt()
        of_size = self.error.square().mean(-1, keepdim=True).sqrt() + of_mean + n * own * size
        y = (self.value - mean) / size
        error = (self.error + mean_error + of_mean + y.abs() * of_size) / (size - of_size)
        return Bounded(y, error).rounded(torch.float32)

    def codes(self, inverse: "Bounded | Tensor | float", zero_point: Tensor) -> "Bounded":
        """Codes from 0 to 255: the middle between the smallest and the largest possible code. The error is 0 unless a
        tie is near."""
        y = self * inverse + zero_point
        least, largest = ((y.value + sign * y.error).round().clamp(0, 255) for sign in (-1, 1))
        return Bounded((least + largest) / 2, (largest - least) / 2)

    def check(self, found: Tensor, dtype: torch.dtype) -> None:
        """Assert that ``found`` is within the error and one rounding to ``dtype``; int8 stands for codes minus 128."""
        widened = self.rounded(dtype) if dtype in (torch.float16, torch.bfloat16) else self
        assert found.dtype == dtype and found.shape == self.value.shape
        error = (found.double() + (128 if dtype == torch.int8 else 0) - self.value).abs()
        wrong = ~(error <= widened.error)
        times = (error / widened.error)[wrong]
        assert not wrong.any(), f"{len(times)} of {wrong.numel()} are wrong, by up to {times.max():.3g} times the bound"


def known(x: "Bounded | Tensor | float") -> Bounded:
    """``x`` with an error of 0, or as it is if it is ``Bounded``."""
    if isinstance(x, Bounded):
        return x
    value = torch.as_tensor(x).double()
    return Bounded(value, torch.zeros_like(value))
