"""Forms of a weight that a kernel wants but a state dict should not hold, made once and dropped with the weight.

An entry belongs to a storage, an address in it and a version counter: a weight that is replaced, freed or changed in
place never meets a stale form. Inference tensors carry no version; after changing one in place call :func:`clear`.
"""

import threading
import weakref
from collections.abc import Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .packing import unpack_weight

Form = TypeVar("Form")
MAX_FORMS = 8  # kept per weight: convolutions are laid out anew for every input size


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Prepared:
    """One integer weight and the forms made of it so far (``forms`` is keyed by kernel and geometry)."""

    __slots__ = ("bits", "length", "forms", "exact")

    def __init__(self, bits: int, length: int):
        self.bits, self.length = bits, length
        self.forms: dict[Hashable, Any] = {}
        self.exact: bool | None = None  # whether pairs of products fit 16 bits; None: not looked at yet

    def keep(self, key: Hashable, form: Form) -> Form:
        """``form``, which is remembered; the oldest one is not any more where there are too many."""
        with _lock:
            while len(self.forms) >= MAX_FORMS:
                del self.forms[next(iter(self.forms))]
            self.forms[key] = form
        return form


class _Identity:
    """Which memory a tensor shows, and in which state; holds no reference to it."""

    __slots__ = ("storage", "address", "version", "shape", "stride")

    def __init__(self, tensor: Tensor, dropped=None):
        self.storage = weakref.ref(tensor.untyped_storage(), dropped)
        self.address, self.version = tensor.data_ptr(), _version(tensor)
        self.shape, self.stride = tensor.shape, tensor.stride()

    def still(self, tensor: Tensor) -> bool:
        return (
            self.version == _version(tensor)
            and self.storage() is tensor.untyped_storage()
            and self.address == tensor.data_ptr()
            and self.shape == tensor.shape
            and self.stride == tensor.stride()
        )


class _Entry:
    __slots__ = ("weight", "zero_point", "value", "__weakref__")


_entries: dict[tuple[int, int, int], _Entry] = {}
_lock = threading.RLock()  # reentrant: a collection inside an insert may drop another entry
_mode = "speed"


def weight_cache(mode: str) -> None:
    """ "speed" keeps the prepared form of every weight; "memory" unpacks at each call and keeps nothing."""
    global _mode
    if mode not in ("speed", "memory"):
        raise ValueError(f"weight_cache mode={mode!r}: expected 'speed' or 'memory'")
    _mode = mode
    if mode == "memory":
        clear()


def clear() -> None:
    """Forget every prepared weight."""
    with _lock:
        _entries.clear()


def count() -> int:
    """How many weights are prepared at the moment."""
    return len(_entries)


def _insert(key: tuple[int, int, int], weight: Tensor, zero_point: Tensor | None, value: Prepared) -> None:
    entry = _Entry()
    this = weakref.ref(entry)

    def drop(_):
        with _lock:
            if key in _entries and _entries[key] is this():
                del _entries[key]

    entry.weight = _Identity(weight, drop)
    entry.zero_point = None if zero_point is None else _Identity(zero_point)
    entry.value = value
    with _lock:
        _entries[key] = entry


def find(weight: Tensor, zero_point: Tensor | None, bits: int, length: int) -> Prepared | None:
    """The prepared forms of this weight, if it is known and unchanged. ``length``: unpacked last dimension."""
    entry = _entries.get((weight.data_ptr(), bits, length))
    if entry is None or not entry.weight.still(weight):
        return None
    kept = entry.zero_point
    same = zero_point is None if kept is None else zero_point is not None and kept.still(zero_point)
    return entry.value if same else None


def add(weight: Tensor, zero_point: Tensor | None, bits: int, length: int) -> Prepared:
    """A new set of forms; remembered in "speed" mode only."""
    value = Prepared(bits, length)
    if _mode == "speed":
        _insert((weight.data_ptr(), bits, length), weight, zero_point, value)
    return value


def keeps() -> bool:
    """Whether prepared weights outlive the call."""
    return _mode == "speed"


def integers(weight: Tensor, zero_point: Tensor | None, bits: int, length: int) -> Tensor:
    """int8 weight as it enters the product, contiguous."""
    with torch.no_grad():
        return unpack_weight(weight, zero_point, bits, length).contiguous()
