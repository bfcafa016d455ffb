"""Paddle's tensors, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelfuse.dtypes import DType
from modelfuse.kernels import Bytes
from modelfuse.kernels.arrays.library import Array, Library, Tensor


class PaddleLibrary(Library):
    """Paddle's tensors.

    Args:
        paddle: The imported module.
        gpu: Whether to compute on a GPU: the first that Paddle sees.
        worker_bytes: See :class:`Library`.
        most: See :class:`Library`.

    Paddle has one stream for all threads: on a GPU, copies of one worker overlap with the file I/O of the others, and
    with arithmetic as far as the stream allows.
    """

    def __init__(self, paddle: Any, gpu: bool, worker_bytes: int, most: int) -> None:
        super().__init__(paddle, gpu, worker_bytes, most)
        self._place = paddle.CUDAPlace(0) if gpu else paddle.CPUPlace()

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._module.no_grad():
            if not self._gpu:
                yield
                return
            self._module.set_device("gpu:0")  # The current device is per thread.
            self._own.pinned = []
            yield
            self._module.device.synchronize()
            self._own.pinned = []

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        return np.empty(shape, np.uint8)

    def load(self, raw: Bytes, dtype: DType) -> Tensor:
        if self._gpu:
            pinned = self._module.to_tensor(raw, place=self._module.CUDAPinnedPlace())
            self._own.pinned.append(pinned)  # Must stay alive until the copy is complete.
            return self.view(pinned._copy_to(self._place, False), str(dtype.paddle))
        return self.view(self._module.utils.dlpack.from_dlpack(raw), str(dtype.paddle))

    def store(self, x: Tensor, out: Bytes) -> None:
        out[:] = self.view(x, "uint8").numpy()

    def to_device(self, values: Array) -> Tensor:
        return self._module.to_tensor(values, place=self._place)

    def fetch(self, x: Tensor) -> Array:
        values: Array = x.numpy()
        return values

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.astype(dtype)

    def view(self, x: Tensor, dtype: str) -> Tensor:
        return x.view(dtype)

    def arange(self, first: int, count: int) -> Tensor:
        return self._module.arange(first, first + count, dtype="int64")

    def shift_right(self, x: Tensor, bits: int) -> Tensor:
        return self._module.bitwise_right_shift(x, self._module.full([], bits, x.dtype), False) if bits else x

    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        return self._module.gather(x, indices)

    def join(self, *parts: Tensor) -> Tensor:
        return self._module.concat(list(parts))

    def join_columns(self, *parts: Tensor) -> Tensor:
        return self._module.concat(list(parts), 1)
