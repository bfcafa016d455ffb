"""The operations that numpy, torch and Paddle share, under common names.

Everything in :mod:`modelfuse.kernels.arrays` is written once over this interface and over the operators that behave
alike in all libraries: arithmetic, comparison, ``&``, ``|``, ``^``, ``~``, ``abs()``, ``reshape``, slices. Two rules:
Operands are always tensors (0-dimensional ones for numbers): given a Python number, Paddle adds a zero, which loses
the sign of −0, and torch on a GPU multiplies by the reciprocal instead of dividing. Floats are never compared with
``==`` or ``!=``: Paddle treats values closer than 10⁻⁸ as equal.
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
from modelfuse.methods.spec import Algebra

#: A tensor of any of the libraries, on its device.
Tensor = Any
Array = np.ndarray[Any, Any]

INTEGERS = {"float32": "int32", "float64": "int64"}


class Library(ABC):
    """A tensor library on one device; thread-safe.

    Args:
        module: The imported library.
        gpu: Whether to compute on a GPU.
        worker_bytes: As the attribute.
        most: As the attribute.

    Attributes:
        worker_bytes: Bytes of the device's memory that each worker may use.
        most: The most elements of a block: on the CPU, as many as stay in the cache.
    """

    def __init__(self, module: Any, gpu: bool, worker_bytes: int, most: int) -> None:
        self._module, self._gpu = module, gpu
        self.worker_bytes, self.most = worker_bytes, most
        #: Per-worker cache: a tensor made on one stream may not be ready on another.
        self._own = threading.local()

    def algebra(self) -> Algebra | None:
        """What computes with the matrices of whole-matrix methods; None: numpy and compiled loops, on the processor."""
        return None

    def running(self) -> AbstractContextManager[None]:
        """Context for the main thread while workers run."""
        return self._running()

    @contextmanager
    def _running(self) -> Iterator[None]:
        yield

    @abstractmethod
    def working(self) -> AbstractContextManager[None]:
        """Context for a worker's use of the library; all copies are complete when it exits."""

    @abstractmethod
    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        """Host memory that is fastest to copy to and from the device (pinned, for a GPU), uint8."""

    @abstractmethod
    def load(self, raw: Bytes, dtype: DType) -> Tensor:
        """Copy stored elements to the device, shape (elements,); ``raw`` must stay as it is in :meth:`working`."""

    @abstractmethod
    def store(self, x: Tensor, out: Bytes) -> None:
        """Copy a tensor's bytes into ``out``; complete when :meth:`working` exits."""

    @abstractmethod
    def to_device(self, values: Array) -> Tensor:
        """Copy a numpy array of float32, float64, int32 or int64 to the device."""

    @abstractmethod
    def fetch(self, x: Tensor) -> Array:
        """Copy a tensor to the host, synchronously."""

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
        """Logical right shift of integers: zeros are shifted in, whatever the sign."""

    def finite(self, x: Tensor) -> Tensor:
        """Whether each element is neither NaN nor infinite."""
        return self._module.isfinite(x)

    def count(self, mask: Tensor) -> Tensor:
        """The number of true elements: int64, 0-dimensional."""
        return mask.sum()

    def where(self, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """``x`` where true, else ``y``."""
        return self._module.where(mask, x, y)

    def root(self, x: Tensor) -> Tensor:
        """Square roots, correctly rounded."""
        return self._module.sqrt(x)

    def bincount(self, x: Tensor, length: int, weights: Tensor | None = None) -> Tensor:
        """Counts of each integer from 0 on, or float64 sums of their weights; at least ``length`` entries."""
        return self._module.bincount(x, weights=weights, minlength=length)

    def nonzero(self, mask: Tensor) -> Tensor:
        """The indices of the true elements: int64, shape (number,)."""
        return self._module.nonzero(mask).reshape([-1])

    @abstractmethod
    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        """The elements at these indices."""

    def find(self, ascending: Tensor, x: Tensor) -> Tensor:
        """For each element, the first index in ``ascending`` whose value is no less, int64."""
        return self._module.searchsorted(ascending, x)

    @abstractmethod
    def join(self, *parts: Tensor) -> Tensor:
        """Concatenate one-dimensional tensors."""

    @abstractmethod
    def join_columns(self, *parts: Tensor) -> Tensor:
        """Concatenate tensors along axis 1."""

    def stack(self, *parts: Tensor) -> Tensor:
        """Stack tensors along a new first axis."""
        return self._module.stack(list(parts))

    def number(self, value: float | int, dtype: str) -> Tensor:
        """A 0-dimensional tensor of this value."""
        return self.to_device(np.array(value, dtype))
