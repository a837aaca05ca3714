"""BOS rows: recognised by value, row by row, wherever they are in a batch or a chunked prompt.

CLIP's first token is the same for every prompt and 50-80 times larger than the others (823 against 10-15 in SDXL,
MixDQ, arXiv 2405.17873, section 4.1). Layers that read the text embedding hold their output for it precomputed; the
range of their quantizer excludes it.
"""

from __future__ import annotations

from torch import Tensor

# The tolerance allows for the rounding of a 16-bit text encoder: a share of the element's own magnitude plus a share of
# the row's usual magnitude. The row of another layer (clip skip) or encoder has the same outlier, but differs in the
# other elements by as much as their usual magnitude: the outlier must not set their tolerance.
OWN_SHARE, USUAL_SHARE = 2.0**-6, 2.0**-2


def bos_mask(x: Tensor, embedding: Tensor) -> Tensor:
    """Whether each row of ``x`` [..., D] is the BOS ``embedding`` [D]: bool [..., 1]."""
    reference = embedding.float()
    size = reference.abs()
    usual = size.sqrt().mean().square()  # a mean that one outlier of 1000 hardly moves
    return ((x.float() - reference).abs() <= OWN_SHARE * size + USUAL_SHARE * usual).all(-1, keepdim=True)
