import pytest
import torch

from inductor_kernels.methods import Methods

ROWS = torch.tensor([2, 0])


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, 3),
        slice(None, -1),
        slice(None, None, 2),
        None,
        Ellipsis,
        (slice(None), slice(None), None, None),
        (Ellipsis, slice(1, None)),
        (0, Ellipsis, None, 1),
        (Ellipsis, None),
        (slice(None), 1, slice(2)),
        ROWS,
        (slice(None), ROWS),
        (ROWS, None, Ellipsis),
        (ROWS, ROWS),
    ],
    ids=str,
)
def test_indexing_as_torch_does(index):
    x = torch.randn(3, 4, 5)
    expected = x[index]
    with Methods():
        y = x[index]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("permuted", [False, True])
def test_contiguous_as_torch_makes_it(memory_format, permuted):
    x = torch.randn(2, 3, 4, 5)
    x = x.permute(0, 2, 3, 1) if permuted else x
    expected = x.contiguous(memory_format=memory_format)
    with Methods():
        y = x.contiguous(memory_format=memory_format)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    assert (y is x) == (expected is x)
