"""Small tensors that many weights have in common, held once: activation parameters of tied layers, the BOS embedding.

Compiled code tells inputs apart by identity. Layers that hold the *same* activation parameters share one quantize of
the tensor they read, and layers with the same BOS embedding one mask; equal copies would each get their own.
"""

from __future__ import annotations

import hashlib
import threading
import weakref

import torch
from torch import Tensor

_by_value: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()
_by_address: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()
_lock = threading.RLock()  # reentrant: a collection inside may drop an entry


def share(tensor: Tensor | None, *beside: Tensor | None) -> Tensor | None:
    """The one tensor with these values on this device; ``tensor`` itself if it is the first, or not a plain one (fake
    and functional tensors, while a graph is traced). What is returned must never be changed in place.

    ``beside``: tensors whose values must be the same too. Zero points are small numbers that agree by chance; layers
    share one only with the scale it belongs to, so that equal blocks of a model look equal to a compiler.
    """
    if tensor is None or not _plain(tensor, *beside):
        return tensor
    with _lock:
        # An alias, as detach() makes, is recognised without reading its values.
        found = _by_address.get((*_layout(tensor), tensor.data_ptr()))
        return _only(tensor, _values(tensor, *beside)) if found is None else found


def moved(tensor: Tensor, device: torch.device, *beside: Tensor | None) -> Tensor:
    """``tensor`` on ``device``, shared there. From a CPU nothing is copied where it is known already, and nothing is
    read back. Waits until it has arrived: before that it has other values."""
    if not _plain(tensor, *beside) or tensor.device.type != "cpu":
        return share(tensor.to(device), *beside)  # type: ignore[return-value]  # there is one
    values = _values(tensor, *beside)
    with _lock:
        found = _by_value.get((device, tensor.dtype, tensor.shape, *values))
        return _only(tensor.to(device), values) if found is None else found


def _plain(*tensors: Tensor | None) -> bool:
    return not any(t is not None and (type(t) is not Tensor or t.is_meta) for t in tensors)


def _layout(tensor: Tensor) -> tuple:
    return tensor.device, tensor.dtype, tensor.shape


def _values(*tensors: Tensor | None) -> tuple[bytes, ...]:
    return tuple(t.cpu().numpy().tobytes() for t in tensors if t is not None)


def _only(tensor: Tensor, values: tuple[bytes, ...]) -> Tensor:
    found = _by_value.setdefault((*_layout(tensor), *values), tensor)
    _by_address[(*_layout(found), found.data_ptr())] = found
    return found


def key(*tensors: Tensor | None) -> str | None:
    """A digest of the tensors' values, the same in every process; None when one is not a plain tensor."""
    if not _plain(*tensors):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(b"-" if tensor is None else tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
