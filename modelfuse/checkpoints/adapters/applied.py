"""A base with an adapter applied, as a model that is computed on read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.adapter import Adapter
from modelfuse.checkpoints.adapters.arrays import read_values
from modelfuse.checkpoints.tensors import MovedTensor, Reader
from modelfuse.dtypes import computed_in
from modelfuse.storage.files import Buffer

#: Elements that are added at a time.
PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class AppliedTensor(MovedTensor):
    """The sum of a base's tensor and a difference to it, in float32 unless one of them is float64.

    Attributes:
        base: The base's tensor.
        delta: The difference.
    """

    base: StoredTensor
    delta: StoredTensor

    @property
    def is_delta(self) -> bool:
        """False: it is a whole tensor."""
        return False

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The base's tensor and the difference."""
        return (self.base, self.delta)

    @property
    def reader_bytes(self) -> int:
        """Memory to read both, and a piece of each."""
        return self.base.reader_bytes + self.delta.reader_bytes + 2 * self.dtype.nbytes(PIECE)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open both for reading."""
        with self.base.open() as base, self.delta.open() as delta:

            def read(start: int, buffer: Buffer) -> None:
                out = np.frombuffer(buffer, self.dtype.compute)
                for begin in range(0, out.size, PIECE):
                    piece = out[begin : begin + PIECE]
                    values = read_values(base, self.base.dtype, start + begin, piece.size)
                    piece[:] = values
                    piece += read_values(delta, self.delta.dtype, start + begin, piece.size)

            yield read


def applied(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """The base with an adapter applied.

    Args:
        adapter: The adapter, opened over the base.
        base: The base.
    """
    tensors = {
        name: AppliedTensor(name, computed_in(tensor.dtype, base[name].dtype), tensor.shape, base[name].file,
                            base[name].offset, base[name], tensor)
        if tensor.is_delta else tensor
        for name, tensor in adapter.tensors.items()
    }  # fmt: skip
    return replace(base, tensors=tensors)
