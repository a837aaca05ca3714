"""BOS rows: recognised by value, row by row, wherever they stand in a batch or a chunked prompt.

CLIP's first token is the same for every prompt and 50-80 times larger than the others (823 against 10-15 in SDXL,
MixDQ, arXiv 2405.17873, section 4.1). Layers that read the text embedding get its output precomputed; the range of
their quantizer excludes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A row is BOS when it is within this fraction of the embedding's largest magnitude, in every element. Type rounding
# is 2^-8 of an element's own size (bfloat16), at most 2^-8 of the largest; other rows differ by nearly all of it.
RELATIVE_TOLERANCE = 2.0**-6


def bos_mask(x: Tensor, embedding: Tensor) -> Tensor:
    """Which rows of ``x`` [..., D] are the BOS ``embedding`` [D]: bool [..., 1]."""
    reference = embedding.to(torch.float32)
    tolerance = reference.abs().amax() * RELATIVE_TOLERANCE
    return ((x.to(torch.float32) - reference).abs() <= tolerance).all(-1, keepdim=True)
