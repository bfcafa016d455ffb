"""numpy arrays on the CPU: the backend that needs neither a compiler nor another library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from modelfuse.dtypes import BF16, DType
from modelfuse.kernels import Bytes
from modelfuse.kernels.arrays.library import Array, Library, Tensor
from modelfuse.kernels.bfloat16 import from_bfloat16, halves_of, to_bfloat16


class NumpyLibrary(Library):
    """numpy arrays. numpy has no bfloat16: such values are float32 here, and stored as their upper halves.

    Args:
        worker_bytes: See :class:`Library`.
        most: See :class:`Library`.
    """

    def __init__(self, worker_bytes: int, most: int) -> None:
        super().__init__(np, False, worker_bytes, most)

    @contextmanager
    def working(self) -> Iterator[None]:
        with np.errstate(all="ignore"):
            yield

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        return np.empty(shape, np.uint8)

    def load(self, raw: Bytes, dtype: DType) -> Tensor:
        if dtype is BF16:
            return from_bfloat16(raw.view(np.uint16))
        return raw.view(str(dtype.torch))

    def store(self, x: Tensor, out: Bytes) -> None:
        if x.nbytes == out.nbytes:
            out.view(x.dtype)[:] = x
        else:
            out.view(np.uint16)[:] = halves_of(x)

    def to_device(self, values: Array) -> Tensor:
        return np.array(values)

    def fetch(self, x: Tensor) -> Array:
        return np.asarray(x)

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return to_bfloat16(x) if dtype == "bfloat16" else np.asarray(x).astype(dtype, copy=False)

    def view(self, x: Tensor, dtype: str) -> Tensor:
        return np.asarray(x).view(dtype)

    def arange(self, first: int, count: int) -> Tensor:
        return np.arange(first, first + count, dtype=np.int64)

    def shift_right(self, x: Tensor, bits: int) -> Tensor:
        unsigned = x.view(f"u{x.itemsize}")
        return (unsigned >> unsigned.dtype.type(bits)).view(x.dtype)

    def nonzero(self, mask: Tensor) -> Tensor:
        return np.flatnonzero(mask)

    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        return x[indices]

    def join(self, *parts: Tensor) -> Tensor:
        return np.concatenate(parts)

    def join_columns(self, *parts: Tensor) -> Tensor:
        return np.concatenate(parts, axis=1)

    def bincount(self, x: Tensor, length: int, weights: Tensor | None = None) -> Tensor:
        return np.bincount(x, weights, length)
