"""One of two processes: python -m tests.models.parallel_program RANK PORT."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist

from .ranks import end


def main(rank: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from mixdq_ao import QuantizationError, calibrate, mixdq_config, quantize_
    from mixdq_ao.layers import find_layers
    from mixdq_ao.models.tensor_parallel import tensor_parallel

    from ..conftest import small_unet, unet_inputs
    from .conftest import mixed_plan

    try:
        tensor_parallel(small_unet(heads=(1, 1)))
    except QuantizationError as e:
        assert "1 heads" in str(e), e
    else:
        raise AssertionError("one head cannot be divided")
    model = small_unet()
    torch.manual_seed(2)
    inputs = unet_inputs()
    calibration = calibrate(model, run=lambda: model(**inputs))
    quantize_(model, mixdq_config(mixed_plan(model, calibration)))
    bytes_before = sum(m.weight.qdata.numel() for m in find_layers(model).values() if hasattr(m.weight, "qdata"))
    with torch.no_grad():
        expected = model(**inputs)[0]
        names = tensor_parallel(model)
        found = model(**inputs)[0]
    assert len(names) % 3 == 0 and any("attn2" in n for n in names) and any("ff" in n for n in names), names
    bytes_after = sum(m.weight.qdata.numel() for m in find_layers(model).values() if hasattr(m.weight, "qdata"))
    assert bytes_after < bytes_before
    with pytest.raises(QuantizationError, match="FSDP2"):
        model(**{**inputs, "sample": inputs["sample"].requires_grad_()})[0].sum().backward()
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    both = [torch.empty_like(found) for _ in range(2)]
    dist.all_gather(both, found)
    assert torch.equal(both[0], both[1])
    end(difference)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
