"""A self-contained web page from a folder of results."""

from .build import build

__all__ = ["build"]
