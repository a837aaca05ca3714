import pytest
import torch

from inductor_kernels.indexing import Indexing

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
def test_same_as_torch(index):
    x = torch.randn(3, 4, 5)
    expected = x[index]
    with Indexing():
        y = x[index]
    assert torch.equal(y, expected)
