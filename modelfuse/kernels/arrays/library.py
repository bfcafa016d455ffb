"""The thin table of operations that torch and Paddle share, under one name each.

Everything in :mod:`modelfuse.kernels.arrays` is written once over this table and over what tensors of both
libraries do alike: arithmetic, comparison, ``&``, ``|``, ``^``, ``~``, ``abs()``, ``reshape`` and slices. Two
things are never done. Operands are tensors, 0-dimensional ones for numbers: given a Python number, Paddle adds a zero
(which loses the sign of −0), and torch on a GPU multiplies by the reciprocal instead of dividing. And floats are never
compared with ``==`` or ``!=``, as those closer than 10⁻⁸ are equal to Paddle.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from modelfuse.dtypes import DType
from modelfuse.kernels import Bytes

#: A tensor of either library, on its device.
Tensor = Any
Array = np.ndarray[Any, Any]

INTEGERS = {"float32": "int32", "float64": "int64"}


class Library(ABC):
    """A tensor library on one device. All of it is safe to use from several threads.

    Args:
        module: torch or paddle; it is imported only where it is asked for.
        gpu: Whether to compute on a GPU.
        worker_bytes: As the attribute.
        most: As the attribute.

    Attributes:
        worker_bytes: Bytes of the device's memory that each worker may fill.
        most: Elements of a block that is walked once: as many as stay in the cache, where there is one.
    """

    def __init__(self, module: Any, gpu: bool, worker_bytes: int, most: int) -> None:
        self._module, self._gpu = module, gpu
        self.worker_bytes, self.most = worker_bytes, most
        #: Each worker's own: what was made on one stream may not be ready on another one.
        self._own = threading.local()

    def running(self) -> AbstractContextManager[None]:
        """What must be set while workers run; the main thread's part."""
        return self._running()

    @contextmanager
    def _running(self) -> Iterator[None]:
        yield

    @abstractmethod
    def working(self) -> AbstractContextManager[None]:
        """What must be set around a worker's use of the library; when it ends, all copies are done."""

    @abstractmethod
    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        """Memory of the host that the device copies from and to fastest, uint8."""

    @abstractmethod
    def load(self, raw: Bytes, dtype: DType) -> Tensor:
        """Stored elements on the device, shape (elements,). ``raw`` must not change until the work is done."""

    @abstractmethod
    def store(self, x: Tensor, out: Bytes) -> None:
        """Copy a tensor's bytes into ``out``; they are there when the work is done."""

    @abstractmethod
    def to_device(self, values: Array) -> Tensor:
        """A numpy array of float32, float64, int32 or int64 on the device."""

    @abstractmethod
    def fetch(self, x: Tensor) -> Array:
        """A tensor's values on the host; waits for them."""

    @abstractmethod
    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """The same values in another type, rounded to nearest even."""

    @abstractmethod
    def view(self, x: Tensor, dtype: str) -> Tensor:
        """The same bytes read as another type."""

    @abstractmethod
    def arange(self, first: int, count: int) -> Tensor:
        """The integers from ``first`` on, int64, shape (count,)."""

    @abstractmethod
    def shift_right(self, x: Tensor, bits: int) -> Tensor:
        """Integers shifted so that zeros follow, whatever the sign."""

    def finite(self, x: Tensor) -> Tensor:
        """Whether each element is neither NaN nor infinite."""
        return self._module.isfinite(x)

    def count(self, mask: Tensor) -> Tensor:
        """How many are true, int64, 0-dimensional."""
        return mask.sum()

    def where(self, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """``x`` where true, else ``y``."""
        return self._module.where(mask, x, y)

    def root(self, x: Tensor) -> Tensor:
        """Square roots, correctly rounded."""
        return self._module.sqrt(x)

    def bincount(self, x: Tensor, length: int, weights: Tensor | None = None) -> Tensor:
        """How often each integer from 0 occurs, or the float64 sums of its weights; at least ``length`` of them."""
        return self._module.bincount(x, weights=weights, minlength=length)

    def nonzero(self, mask: Tensor) -> Tensor:
        """Where it is true, int64, shape (number,)."""
        return self._module.nonzero(mask).reshape([-1])

    @abstractmethod
    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        """The elements at these indices."""

    def find(self, ascending: Tensor, x: Tensor) -> Tensor:
        """For each element, the first index in ``ascending`` whose value is no less, int64."""
        return self._module.searchsorted(ascending, x)

    @abstractmethod
    def join(self, *parts: Tensor) -> Tensor:
        """One-dimensional tensors, one after another."""

    @abstractmethod
    def join_columns(self, *parts: Tensor) -> Tensor:
        """Tensors side by side, along axis 1."""

    def stack(self, *parts: Tensor) -> Tensor:
        """Tensors of one shape along a new first axis."""
        return self._module.stack(list(parts))

    def number(self, value: float | int, dtype: str) -> Tensor:
        """A 0-dimensional tensor of this value."""
        return self.to_device(np.array(value, dtype))
