"""Decode stored elements to arrays, and cache what is computed from them while it is in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from msgspec import Struct, field

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.tensors import Reader
from modelfuse.dtypes import BF16, DType
from modelfuse.errors import CheckpointError
from modelfuse.kernels.bfloat16 import from_bfloat16, halves_of, to_bfloat16

Array = np.ndarray[Any, np.dtype[Any]]


def widen(dtype: DType, raw: Array) -> Array:
    """Decode stored bytes to the compute type of ``dtype``."""
    if dtype == BF16:
        return from_bfloat16(raw.view(np.uint16))
    values: Array = raw.view(np.dtype(dtype.numpy))
    return values.astype(dtype.compute or "float32", copy=False)


def narrow(dtype: DType, values: Array) -> Array:
    """Round float32 values to a 16-bit type, ties to even, and encode them."""
    if dtype != BF16:
        return values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), halves_of(to_bfloat16(np.ascontiguousarray(values))))


def read_values(read: Reader, dtype: DType, start: int, count: int) -> Array:
    """Read and decode elements of an open tensor."""
    raw = np.empty(dtype.nbytes(count), np.uint8)
    read(start, raw.data)
    return widen(dtype, raw)


def load(tensor: StoredTensor, strict: bool) -> Array:
    """Read and decode a whole tensor, in its shape.

    Raises:
        CheckpointError: If ``strict`` and any element is not finite.
    """
    with tensor.open() as read:
        values = read_values(read, tensor.dtype, 0, tensor.size).reshape(tensor.shape)
    if strict and not np.isfinite(values).all():
        bad = values.size - np.count_nonzero(np.isfinite(values))
        raise CheckpointError(
            f"Tensor {tensor.name!r} of {tensor.file.path} holds NaN or infinite values ({bad:,})",
            "Use --on_nonfinite propagate to let such values through.",
        )
    return values


class _Entry(Struct):
    lock: threading.Lock = field(default_factory=threading.Lock)
    value: Any = None


class Recent:
    """A thread-safe LRU cache of computed values.

    Args:
        most: The number of values.
    """

    def __init__(self, most: int = 2) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def __reduce__(self) -> tuple[type[Recent], tuple[int]]:
        # Not sent to other processes, which compute their own values.
        return Recent, (self.most,)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of ``key``: cached, or computed now while other threads wait for it."""
        with self._lock:
            entry = self._entries.pop(key, None) or _Entry()
            self._entries[key] = entry
            while len(self._entries) > self.most:
                self._entries.popitem(last=False)
        with entry.lock:
            if entry.value is None:
                entry.value = make()
            return entry.value
