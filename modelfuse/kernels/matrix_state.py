"""What the pass over whole matrices carries from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.dtypes import DType
from modelfuse.kernels import Bytes
from modelfuse.kernels.arrays.arithmetic import Arithmetic
from modelfuse.kernels.arrays.numpy import NumpyLibrary
from modelfuse.kernels.matrices import Readable
from modelfuse.methods.spec import Floats


@dataclass
class MatrixState:
    """A span under way.

    Attributes:
        bad: As of every span.
        writes: Whether the step is one that writes.
        values: Of the last step that does not: differences, float64, shape (matrices, elements).
        result: The merged difference of the slice that is filled, float64.
    """

    bad: np.ndarray[Any, np.dtype[np.int64]]
    result: Floats
    writes: bool = False
    values: Floats = field(default_factory=lambda: np.empty((0, 0)))
    library: NumpyLibrary = field(default_factory=lambda: NumpyLibrary(0, 0))
    arithmetic: Arithmetic = field(init=False)

    def __post_init__(self) -> None:
        self.arithmetic = Arithmetic(self.library, "float64")

    def decode(self, raw: Bytes, dtype: DType) -> Floats:
        """Stored elements as float64."""
        values: Floats = self.arithmetic.decode(self.library.load(raw, dtype))
        return values

    def read_grams(self, grams: Sequence[Readable], unit: int, k: int) -> Floats:
        """Gram matrices from files: of each model that of one matrix, shape (models, k, k)."""
        found = np.empty((len(grams), k, k))
        for own, gram in zip(found, grams, strict=True):
            raw = np.empty(gram.dtype.nbytes(own.size), np.uint8)
            with gram.open() as read:
                read(unit * own.size, raw.data)
            own[:] = self.decode(raw, gram.dtype).reshape(own.shape)
        return found
