"""Stored elements as arrays, and what is computed from them kept while it is in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.tensors import Reader
from modelfuse.dtypes import BF16, DType
from modelfuse.errors import CheckpointError
from modelfuse.kernels.bfloat16 import from_bfloat16, halves_of, to_bfloat16

Array = np.ndarray[Any, np.dtype[Any]]


def widen(dtype: DType, raw: Array) -> Array:
    """Stored bytes as numbers of the type that ``dtype`` computes in."""
    if dtype == BF16:
        return from_bfloat16(raw.view(np.uint16))
    values: Array = raw.view(np.dtype(dtype.numpy))
    return values.astype(dtype.compute or "float32", copy=False)


def narrow(dtype: DType, values: Array) -> Array:
    """float32 values rounded to a 16-bit type, to nearest even, as the numbers that are stored."""
    if dtype != BF16:
        return values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), halves_of(to_bfloat16(np.ascontiguousarray(values))))


def read_values(read: Reader, dtype: DType, start: int, count: int) -> Array:
    """So many elements of an open tensor as numbers."""
    raw = np.empty(dtype.nbytes(count), np.uint8)
    read(start, raw.data)
    return widen(dtype, raw)


def load(tensor: StoredTensor, strict: bool) -> Array:
    """All of a tensor as numbers, in its shape.

    Raises:
        CheckpointError: If it is ``strict`` and any of them is not finite.
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


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    value: Any = None


class Recent:
    """The last few values that were made, for any thread: each is made once while it is among them.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int = 2) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def __reduce__(self) -> tuple[type[Recent], tuple[int]]:
        # Another process makes its own values.
        return Recent, (self.most,)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of ``key``: one of the last few, or made now while other threads wait for it."""
        with self._lock:
            entry = self._entries.pop(key, None) or _Entry()
            self._entries[key] = entry
            while len(self._entries) > self.most:
                self._entries.popitem(last=False)
        with entry.lock:
            if entry.value is None:
                entry.value = make()
            return entry.value
