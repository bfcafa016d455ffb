"""torch's tensors, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelfuse.dtypes import DType
from modelfuse.kernels import Bytes
from modelfuse.kernels.arrays.library import Array, Library, Tensor
from modelfuse.methods.spec import Algebra


class TorchLibrary(Library):
    """torch's tensors.

    Args:
        torch: The imported module.
        gpu: Whether to compute on a GPU: torch's current one.
        worker_bytes: See :class:`Library`.
        most: See :class:`Library`.
        bounded: Whether whole matrices must fit ``worker_bytes``, too.

    On a GPU each worker has its own stream, so that copies of one worker overlap with computations of another.
    """

    def __init__(self, torch: Any, gpu: bool, worker_bytes: int, most: int, bounded: bool = True) -> None:
        super().__init__(torch, gpu, worker_bytes, most)
        self._is_bounded = bounded
        self._device = torch.device("cuda" if gpu else "cpu")

    def algebra(self) -> Algebra | None:
        if not self._gpu:
            return None
        from modelfuse.kernels.arrays.device_algebra import DeviceAlgebra

        return DeviceAlgebra(self, self._module, self.worker_bytes if self._is_bounded else None)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Limit torch to one thread per worker: the workers are the parallelism."""
        threads = self._module.get_num_threads()
        self._module.set_num_threads(1)
        try:
            yield
        finally:
            self._module.set_num_threads(threads)

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._module.inference_mode():
            if not self._gpu:
                yield
                return
            if not hasattr(self._own, "stream"):
                self._own.stream = self._module.cuda.Stream()
            with self._module.cuda.stream(self._own.stream):
                yield
                self._own.stream.synchronize()

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        pinned: Bytes = self._module.empty(shape, dtype=self._module.uint8, pin_memory=self._gpu).numpy()
        return pinned

    def load(self, raw: Bytes, dtype: DType) -> Tensor:
        moved = self._module.from_numpy(raw).to(self._device, non_blocking=True)
        return moved.view(getattr(self._module, str(dtype.torch)))

    def store(self, x: Tensor, out: Bytes) -> None:
        self._module.from_numpy(out).copy_(x.view(self._module.uint8), non_blocking=True)

    def to_device(self, values: Array) -> Tensor:
        return self._module.from_numpy(np.ascontiguousarray(values).reshape(values.shape)).to(self._device)

    def fetch(self, x: Tensor) -> Array:
        values: Array = x.cpu().numpy()
        return values

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(getattr(self._module, dtype))

    def view(self, x: Tensor, dtype: str) -> Tensor:
        return x.view(getattr(self._module, dtype))

    def arange(self, first: int, count: int) -> Tensor:
        return self._module.arange(first, first + count, dtype=self._module.int64, device=self._device)

    def shift_right(self, x: Tensor, bits: int) -> Tensor:
        width = x.element_size() * 8
        return (x >> bits) & ((1 << (width - bits)) - 1) if bits else x

    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        return self._module.index_select(x, 0, indices)

    def join(self, *parts: Tensor) -> Tensor:
        return self._module.cat(parts)

    def join_columns(self, *parts: Tensor) -> Tensor:
        return self._module.cat(parts, 1)
