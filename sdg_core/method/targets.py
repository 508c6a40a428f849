"""What guidances compare with, kept from step to step and from run to run.

A target depends on what the guidance is, on its picture and masks, on the encoder's weights, and, where the encoder
reads noise, on the noise that the picture got. All of that together is its key, by content and not by name: a second
run of the same schedule, with the same pictures, finds all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .features import Encoder, Features

CACHE_BYTES = 128 * 2**20
"""Memory, on the device, that the targets of one encoder may keep between runs. The least used are forgotten first."""


class TargetCache:
    """Targets of one encoder, at most ``limit`` bytes of them, in the order in which they were last used."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit, self.size, self._known = limit, 0, dict[Hashable, Features]()

    def find(self, key: Hashable) -> Features | None:
        found = self._known.pop(key, None)
        if found is not None:
            self._known[key] = found
        return found

    def keep(self, key: Hashable, target: Features) -> None:
        """Keeps a target, and forgets others where there are too many. One that is larger than all of it isn't kept."""
        if bytes_of(target) > self.limit:
            return
        self.size += bytes_of(target) - (bytes_of(self._known.pop(key)) if key in self._known else 0)
        self._known[key] = target
        while self.size > self.limit:
            self.size -= bytes_of(self._known.pop(next(iter(self._known))))

    def clear(self) -> None:
        """Forgets all of them."""
        self._known.clear()
        self.size = 0

    def __len__(self) -> int:
        return len(self._known)


def cache_of(encoder: Encoder) -> TargetCache:
    """The targets that an encoder's weights gave: they go with it."""
    return _CACHES.setdefault(encoder, TargetCache())


_CACHES: WeakKeyDictionary[Encoder, TargetCache] = WeakKeyDictionary()


def bytes_of(features: Features) -> int:
    """Memory that features take."""
    tensors = [t for t in (*features.maps, features.embed, features.where) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def content(value: object, inner: Callable[[object], Hashable] | None = None) -> Hashable:
    """What a value says: equal for tensors of equal numbers, and for dataclasses of such; other things are their own
    key. ``inner`` says what a dataclass's fields say; None: likewise."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(data.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return "tensor", str(value.dtype), tuple(value.shape), digest
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple((part.name, (inner or content)(getattr(value, part.name))) for part in fields(value))
    if isinstance(value, tuple | list):
        return tuple(map(content, value))
    return value if isinstance(value, Hashable) else id(value)
