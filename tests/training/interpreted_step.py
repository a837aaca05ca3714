"""The compiled steps as Triton, run by its interpreter (TRITON_INTERPRET=1): one kernel each.

AdamW on bfloat16 against torch's with exact roots, SGD on float16 against the eager steps.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from inductor_kernels import testing
from mixdq_ao import MemoryEfficientAdamW, MemoryEfficientSGD

from .models import BF16, FP16, SPECIAL, ExactRoots, same_bits


def parameters() -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(v) for v in (torch.tensor(SPECIAL), torch.randn(300) * 0.02))


def float16() -> None:
    start, found = torch.cat([torch.randn(300), torch.randn(300) * 1e-6]), []
    for compile in (False, True):
        model = nn.ParameterList([nn.Parameter(start.clone())])
        optimizer = MemoryEfficientSGD.from_fp32(model, FP16, lr=1e-2, momentum=0.9, compile=compile)
        for step in range(2):
            model[0].grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(step)).to(FP16)
            with testing.interpreter():
                optimizer.step()
        found.append((model[0], optimizer.fp32(model[0])))
    (p, exact), (q, compiled) = found
    assert same_bits(p, q) and same_bits(exact, compiled)
    assert not torch.equal(compiled, q.float())


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
    float16()
