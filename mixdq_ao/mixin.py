"""Objects that go on as another class, mixed of their own and one of ours."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def mixed_class(name: str, *bases: type, own: int) -> type[Any]:
    """A class of these bases, the same one for the same arguments.

    No module holds it: its objects are copied and pickled by its bases. ``bases[own]`` is the class an object had
    before, kept as the attribute ``own_class``.
    """

    def reduced(self: Any, protocol: Any) -> Any:
        how: Any = super(mixed, self).__reduce_ex__(protocol)
        return (_blank, (name, bases, own), *how[2:]) if type(self) is mixed else how

    held = {"own_class": bases[own], "__module__": bases[own].__module__, "__reduce_ex__": reduced}
    mixed: type[Any] = type(name, bases, held)
    return mixed


def own_class(value: object) -> type[Any]:
    """The class of an object, of a mixed one the class it had before."""
    return getattr(value, "own_class", type(value))


def _blank(name: str, bases: tuple[type, ...], own: int) -> object:
    """An object of the mixed class that has no state yet."""
    return object.__new__(mixed_class(name, *bases, own=own))
