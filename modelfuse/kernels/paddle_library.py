"""Paddle's tensors, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelfuse.dtypes import DType
from modelfuse.kernels import Bytes
from modelfuse.kernels.library import Array, Library, Tensor


class PaddleLibrary(Library):
    """Paddle's tensors.

    Args:
        paddle: The module; it is imported only where it is asked for.
        gpu: Whether to compute on a GPU: the first that Paddle sees.
        room: As in the library.
        most: As in the library.

    Paddle keeps one stream for all threads: on a GPU, copies of one worker overlap with the reading and writing of
    the others, and with arithmetic as far as the stream allows.
    """

    def __init__(self, paddle: Any, gpu: bool, room: int, most: int) -> None:
        super().__init__(room, most)
        self._paddle = paddle
        self._gpu = gpu
        self._place = paddle.CUDAPlace(0) if gpu else paddle.CPUPlace()

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._paddle.no_grad():
            if not self._gpu:
                yield
                return
            self._paddle.set_device("gpu:0")  # The device is each thread's own.
            self._own.pinned = []
            yield
            self._paddle.device.synchronize()
            self._own.pinned = []

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        return np.empty(shape, np.uint8)

    def load(self, raw: Bytes, dtype: DType) -> Tensor:
        if self._gpu:
            pinned = self._paddle.to_tensor(raw, place=self._paddle.CUDAPinnedPlace())
            self._own.pinned.append(pinned)  # It must live until the copy is done.
            return self.view(pinned._copy_to(self._place, False), str(dtype.paddle))
        return self.view(self._paddle.utils.dlpack.from_dlpack(raw), str(dtype.paddle))

    def store(self, x: Tensor, out: Bytes) -> None:
        out[:] = self.view(x, "uint8").numpy()

    def place(self, values: Array) -> Tensor:
        return self._paddle.to_tensor(values, place=self._place)

    def fetch(self, x: Tensor) -> Array:
        values: Array = x.numpy()
        return values

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.astype(dtype)

    def view(self, x: Tensor, dtype: str) -> Tensor:
        return x.view(dtype)

    def arange(self, first: int, count: int) -> Tensor:
        return self._paddle.arange(first, first + count, dtype="int64")

    def shift_right(self, x: Tensor, bits: int) -> Tensor:
        return self._paddle.bitwise_right_shift(x, self._paddle.full([], bits, x.dtype), False) if bits else x

    def finite(self, x: Tensor) -> Tensor:
        return self._paddle.isfinite(x)

    def count(self, mask: Tensor) -> Tensor:
        return mask.sum()

    def where(self, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._paddle.where(mask, x, y)

    def bincount(self, x: Tensor, length: int, weights: Tensor | None = None) -> Tensor:
        return self._paddle.bincount(x, weights=weights, minlength=length)

    def places(self, mask: Tensor) -> Tensor:
        return self._paddle.nonzero(mask).reshape([-1])

    def take(self, x: Tensor, places: Tensor) -> Tensor:
        return self._paddle.gather(x, places)

    def find(self, ascending: Tensor, x: Tensor) -> Tensor:
        return self._paddle.searchsorted(ascending, x)

    def join(self, *parts: Tensor) -> Tensor:
        return self._paddle.concat(list(parts))

    def stack(self, *parts: Tensor) -> Tensor:
        return self._paddle.stack(list(parts))
