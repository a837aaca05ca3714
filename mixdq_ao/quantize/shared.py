"""Interning of small tensors that many weights share: activation parameters of tied layers, the BOS embedding.

Compilers distinguish inputs by identity. Layers that hold the *same* activation parameters share one quantization of
the tensor they read, and layers with the same BOS embedding share one mask; equal copies would each get their own.
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
    """The one interned tensor with these values on this device: ``tensor`` itself if it is the first, or not a plain
    tensor (fake and functional tensors, while a graph is traced). The result must never be changed in place.

    ``beside``: tensors whose values must agree too. Zero points are small numbers that often agree by chance; they are
    shared only together with their scale, so that equal blocks of a model look equal to a compiler.
    """
    if tensor is None or not _plain(tensor, *beside):
        return tensor
    with _lock:
        # An alias, such as the result of detach(), is recognised by address, without reading its values.
        found = _by_address.get((*_layout(tensor), tensor.data_ptr()))
        return _only(tensor, _values(tensor, *beside)) if found is None else found


def moved(tensor: Tensor, device: torch.device, *beside: Tensor | None) -> Tensor:
    """The interned copy of ``tensor`` on ``device``. From a CPU, a tensor known there is not copied again, and no
    values are read back. Copies are synchronous: an unfinished one has other values."""
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
    """A digest of the tensors' values, the same in every process; None if one is not a plain tensor."""
    if not _plain(*tensors):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(b"-" if tensor is None else tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
