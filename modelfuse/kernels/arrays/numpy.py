"""numpy's arrays, on the CPU: what needs no compiler and no other library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelfuse.dtypes import BF16, DType
from modelfuse.kernels import Bytes
from modelfuse.kernels.arrays.library import Array, Library, Tensor


class NumpyLibrary(Library):
    """numpy's arrays. It has no bfloat16: such values are float32 here, and stored by their upper halves.

    Args:
        room: As in the library.
        most: As in the library.
    """

    def __init__(self, room: int, most: int) -> None:
        super().__init__(np, False, room, most)

    @contextmanager
    def working(self) -> Iterator[None]:
        with np.errstate(all="ignore"):
            yield

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        return np.empty(shape, np.uint8)

    def load(self, raw: Bytes, dtype: DType) -> Tensor:
        if dtype is BF16:
            return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw.view(str(dtype.torch))

    def store(self, x: Tensor, out: Bytes) -> None:
        if x.nbytes == out.nbytes:
            out.view(x.dtype)[:] = x
        else:
            out.view(np.uint16)[:] = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)

    def place(self, values: Array) -> Tensor:
        return np.array(values)

    def fetch(self, x: Tensor) -> Array:
        return np.asarray(x)

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return _to_bfloat16(x) if dtype == "bfloat16" else np.asarray(x).astype(dtype, copy=False)

    def view(self, x: Tensor, dtype: str) -> Tensor:
        return np.asarray(x).view(dtype)

    def arange(self, first: int, count: int) -> Tensor:
        return np.arange(first, first + count, dtype=np.int64)

    def shift_right(self, x: Tensor, bits: int) -> Tensor:
        unsigned = x.view(f"u{x.itemsize}")
        return (unsigned >> unsigned.dtype.type(bits)).view(x.dtype)

    def places(self, mask: Tensor) -> Tensor:
        return np.flatnonzero(mask)

    def take(self, x: Tensor, places: Tensor) -> Tensor:
        return x[places]

    def join(self, *parts: Tensor) -> Tensor:
        return np.concatenate(parts)

    def bincount(self, x: Tensor, length: int, weights: Tensor | None = None) -> Tensor:
        return np.bincount(x, weights, length)


def _to_bfloat16(x: Any) -> Any:
    """The nearest bfloat16 of float32 values, ties to even, as float32; NaN stays NaN."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.where((bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), bits | np.uint32(0x400000), rounded)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
