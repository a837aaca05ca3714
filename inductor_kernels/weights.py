"""A cache of weights in the forms that kernels read and state dicts should not hold. A form is made once and dropped
with its weight.

An entry is valid for one storage, address and version counter, so a weight that was replaced, freed or changed in place
never gets a stale form. Inference tensors have no version counter; after changing one in place call :func:`clear`.
"""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .compat_eager import version
from .packing import unpack_weight

Form = TypeVar("Form")
MAX_FORMS = 8  # kept per weight: oneDNN lays out a convolution's weight for one input size


class Prepared:
    """One integer weight and the forms made of it so far (``forms`` is keyed by kernel and geometry)."""

    __slots__ = ("bits", "length", "forms", "exact")

    def __init__(self, bits: int, length: int) -> None:
        self.bits, self.length = bits, length
        self.forms: dict[Hashable, Any] = {}
        self.exact: bool | None = None  # whether oneDNN's products are exact; None: not checked yet

    def keep(self, key: Hashable, form: Form) -> Form:
        """Remember ``form`` and return it; at ``MAX_FORMS`` the oldest form is dropped."""
        with _lock:
            while len(self.forms) >= MAX_FORMS:
                del self.forms[next(iter(self.forms))]
            self.forms[key] = form
        return form


class _Identity:
    """The memory, version and geometry of a tensor, without a reference that would keep it alive."""

    __slots__ = ("storage", "address", "version", "shape", "stride")

    def __init__(self, tensor: Tensor, dropped: Callable[[Any], None] | None = None) -> None:
        self.storage = weakref.ref(tensor.untyped_storage(), dropped)
        self.address, self.version = tensor.data_ptr(), version(tensor)
        self.shape, self.stride = tensor.shape, tensor.stride()

    def matches(self, tensor: Tensor) -> bool:
        return (
            self.version == version(tensor)
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
    """ "speed" keeps the prepared forms of every weight; "memory" prepares weights at each call and keeps nothing."""
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
    """How many weights have an entry."""
    return len(_entries)


def _insert(key: tuple[int, int, int], weight: Tensor, zero_point: Tensor | None, value: Prepared) -> None:
    entry = _Entry()
    this = weakref.ref(entry)

    def drop(_: Any) -> None:
        with _lock:
            if key in _entries and _entries[key] is this():
                del _entries[key]

    entry.weight = _Identity(weight, drop)
    entry.zero_point = None if zero_point is None else _Identity(zero_point)
    entry.value = value
    with _lock:
        _entries[key] = entry


def find(weight: Tensor, zero_point: Tensor | None, bits: int, length: int) -> Prepared | None:
    """The entry of this weight; None if there is none or the weight changed. ``length``: unpacked last dimension."""
    entry = _entries.get((weight.data_ptr(), bits, length))
    if entry is None or not entry.weight.matches(weight):
        return None
    kept = entry.zero_point
    same = zero_point is None if kept is None else zero_point is not None and kept.matches(zero_point)
    return entry.value if same else None


def add(weight: Tensor, zero_point: Tensor | None, bits: int, length: int) -> Prepared:
    """A new entry without forms; kept in "speed" mode only."""
    value = Prepared(bits, length)
    if _mode == "speed":
        _insert((weight.data_ptr(), bits, length), weight, zero_point, value)
    return value


def keeps() -> bool:
    """Whether entries outlive the call."""
    return _mode == "speed"


def integers(weight: Tensor, zero_point: Tensor | None, bits: int, length: int) -> Tensor:
    """The contiguous int8 weight that enters the product: unpacked, its zero point subtracted."""
    with torch.no_grad():
        return unpack_weight(weight, zero_point, bits, length).contiguous()
