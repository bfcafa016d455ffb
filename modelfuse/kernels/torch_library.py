"""torch's tensors, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelfuse.dtypes import DType
from modelfuse.kernels import Bytes
from modelfuse.kernels.library import Array, Library, Tensor


class TorchLibrary(Library):
    """torch's tensors.

    Args:
        torch: The module; it is imported only where it is asked for.
        gpu: Whether to compute on a GPU: torch's current one.
        room: As in the library.
        most: As in the library.

    On a GPU every worker has a stream of its own: while one computes, another one's copies are under way.
    """

    def __init__(self, torch: Any, gpu: bool, room: int, most: int) -> None:
        super().__init__(room, most)
        self._torch = torch
        self._gpu = gpu
        self._device = torch.device("cuda" if gpu else "cpu")

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Workers are the parallelism; threads of torch's own beside them would only wait for each other."""
        threads = self._torch.get_num_threads()
        self._torch.set_num_threads(1)
        try:
            yield
        finally:
            self._torch.set_num_threads(threads)

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._torch.inference_mode():
            if not self._gpu:
                yield
                return
            if not hasattr(self._own, "stream"):
                self._own.stream = self._torch.cuda.Stream()
            with self._torch.cuda.stream(self._own.stream):
                yield
                self._own.stream.synchronize()

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        pinned: Bytes = self._torch.empty(shape, dtype=self._torch.uint8, pin_memory=self._gpu).numpy()
        return pinned

    def load(self, raw: Bytes, dtype: DType) -> Tensor:
        moved = self._torch.from_numpy(raw).to(self._device, non_blocking=True)
        return moved.view(getattr(self._torch, str(dtype.torch)))

    def store(self, x: Tensor, out: Bytes) -> None:
        self._torch.from_numpy(out).copy_(x.view(self._torch.uint8), non_blocking=True)

    def place(self, values: Array) -> Tensor:
        return self._torch.from_numpy(np.ascontiguousarray(values).reshape(values.shape)).to(self._device)

    def fetch(self, x: Tensor) -> Array:
        values: Array = x.cpu().numpy()
        return values

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(getattr(self._torch, dtype))

    def view(self, x: Tensor, dtype: str) -> Tensor:
        return x.view(getattr(self._torch, dtype))

    def arange(self, first: int, count: int) -> Tensor:
        return self._torch.arange(first, first + count, dtype=self._torch.int64, device=self._device)

    def shift_right(self, x: Tensor, bits: int) -> Tensor:
        width = x.element_size() * 8
        return (x >> bits) & ((1 << (width - bits)) - 1) if bits else x

    def finite(self, x: Tensor) -> Tensor:
        return self._torch.isfinite(x)

    def count(self, mask: Tensor) -> Tensor:
        return mask.sum()

    def where(self, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._torch.where(mask, x, y)

    def bincount(self, x: Tensor, length: int, weights: Tensor | None = None) -> Tensor:
        return self._torch.bincount(x, weights=weights, minlength=length)

    def places(self, mask: Tensor) -> Tensor:
        return self._torch.nonzero(mask).reshape(-1)

    def take(self, x: Tensor, places: Tensor) -> Tensor:
        return self._torch.index_select(x, 0, places)

    def find(self, ascending: Tensor, x: Tensor) -> Tensor:
        return self._torch.searchsorted(ascending, x)

    def join(self, *parts: Tensor) -> Tensor:
        return self._torch.cat(parts)

    def stack(self, *parts: Tensor) -> Tensor:
        return self._torch.stack(parts)
