"""A part of a run, for one of several machines: which pictures it draws, and what its files are called."""

from __future__ import annotations

from ..search.part import Part as Shard


def numbers_of(shard: Shard, count: int) -> range:
    """Its share of the numbers 0 to ``count``: adjacent ones, so that batches are full."""
    return range(count * (shard.index - 1) // shard.of, count * shard.index // shard.of)


def suffix_of(shard: Shard) -> str:
    """Part of file names: shards never write to the same file."""
    return f"{shard.index}-of-{shard.of}"
