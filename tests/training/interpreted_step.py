"""The compiled step as Triton, run by its interpreter (TRITON_INTERPRET=1): one kernel, AdamW with exact roots."""

from __future__ import annotations

import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from inductor_kernels import testing
from mixdq_ao import MemoryEfficientAdamW

from .models import BF16, SPECIAL, ExactRoots, same_bits


def parameters() -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(v) for v in (torch.tensor(SPECIAL), torch.randn(300) * 0.02))


def main() -> None:
    model, reference = parameters(), parameters()
    ours = MemoryEfficientAdamW.from_fp32(model, lr=1e-3, compile=True)
    exact = ExactRoots(reference.parameters(), lr=1e-3)
    with testing.interpreter():
        for step in range(2):
            for p, q in zip(model, reference, strict=True):  # the interpreter takes subnormal bfloat16 for zero
                p.grad = torch.randn(p.shape).to(BF16)
                q.grad = p.grad.float()
            if step == 0:
                _, code = run_and_get_code(ours.step)
                assert [len(testing.kernels(c)) for c in code] == [1], "expected one kernel"
            else:
                ours.step()
            exact.step()
    for p, q in zip(model, reference, strict=True):
        assert same_bits(ours.fp32(p), q)
        assert all(same_bits(ours.state[p][name], exact.state[q][name]) for name in ("exp_avg", "exp_avg_sq"))


if __name__ == "__main__":
    main()
