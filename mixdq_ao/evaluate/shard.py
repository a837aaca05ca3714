"""A shard of a run, for one of several machines: the pictures it generates, and the suffix of its files."""

from __future__ import annotations

from ..search.part import WHOLE
from ..search.part import Part as Shard

__all__ = ["WHOLE", "Shard", "numbers_of", "suffix_of"]


def numbers_of(shard: Shard, count: int) -> range:
    """The picture numbers of a shard, out of 0 to ``count`` - 1; adjacent, so that batches are full."""
    return range(count * (shard.index - 1) // shard.of, count * shard.index // shard.of)


def suffix_of(shard: Shard) -> str:
    """Suffix of file names, so that shards never write to the same file."""
    return f"{shard.index}-of-{shard.of}"
