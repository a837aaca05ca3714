"""Small tensors that many weights have in common, held once: activation parameters of tied layers, the BOS embedding.

Compiled code tells inputs apart by identity. Layers that hold the *same* activation parameters share one quantize of
the tensor they read, and layers with the same BOS embedding one mask; equal copies would each get their own.
"""

from __future__ import annotations

import hashlib
import threading
import weakref

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
    if any(type(t) is not Tensor or t.is_meta for t in (tensor, *beside)) or tensor is None:
        return tensor
    layout = (tensor.device, tensor.dtype, tensor.shape)
    place = (*layout, tensor.data_ptr())  # an alias, as detach() makes, is recognised without reading its values
    with _lock:
        found = _by_address.get(place)
        if found is None:
            values = tuple(t.cpu().numpy().tobytes() for t in (tensor, *beside) if t is not None)
            found = _by_value.setdefault((*layout, *values), tensor)
            _by_address[(*layout, found.data_ptr())] = found
        return found


def key(*tensors: Tensor | None) -> str | None:
    """A digest of the tensors' values, the same in every process; None when one is not a plain tensor."""
    if any(t is not None and (type(t) is not Tensor or t.is_meta) for t in tensors):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(b"-" if tensor is None else tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
