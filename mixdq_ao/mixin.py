"""Changing the class of an object, in place, to one mixed of its own class and one of ours.

The object keeps its identity, attributes, hooks and parameters, is an instance of both classes, and copies and pickles
as such, although no module holds the mixed class.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def mix_in(value: Any, ours: type, *, name: str, ours_first: bool = True) -> None:
    """Makes ``value`` an instance of ``ours`` as well.

    Args:
        value: an object whose class has a ``__dict__`` layout compatible with ``ours``, such as two modules.
        ours: the class to add.
        name: of the mixed class.
        ours_first: whether methods of ``ours`` come before those of the object's own class, or after: ``super()`` in
            its own class then finds them.
    """
    value.__class__ = _mixed_class(name, ours, type(value), ours_first)


def restore(value: Any) -> None:
    """Gives ``value`` the class it had before ``mix_in``."""
    value.__class__ = own_class(value)


def own_class(value: object) -> type[Any]:
    """The class of an object; of a mixed one the class it had before."""
    return getattr(type(value), "own_class", type(value))


@cache
def _mixed_class(name: str, ours: type, own: type, ours_first: bool) -> type[Any]:
    """The same class for the same arguments, so that objects of it are of one type."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        how: Any = super(mixed, self).__reduce_ex__(protocol)
        return (_blank, (name, ours, own, ours_first), *how[2:]) if type(self) is mixed else how

    bases = (ours, own) if ours_first else (own, ours)
    mixed: type[Any] = type(name, bases, {"own_class": own, "__module__": own.__module__, "__reduce_ex__": reduce_ex})
    return mixed


def _blank(name: str, ours: type, own: type, ours_first: bool) -> object:
    """An object of the mixed class without state, for unpickling and copying."""
    return object.__new__(_mixed_class(name, ours, own, ours_first))
