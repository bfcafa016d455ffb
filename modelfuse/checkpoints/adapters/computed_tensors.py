"""Differences and tensors of an adapter, computed on read, in float32 unless a source is float64.

With B of shape [out, rank] and A of shape [rank, in], a LoRA's difference to a weight is scale·B·A (Hu et al. 2021,
arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, load, read_values
from modelfuse.checkpoints.adapters.low_rank_terms import FusedPart, Shared, Term
from modelfuse.checkpoints.tensors import Reader
from modelfuse.dtypes import F64
from modelfuse.storage.files import Buffer


@dataclass(frozen=True, slots=True)
class LowRankTensor(StoredTensor):
    """The sum of low-rank products: a difference to the base.

    Attributes:
        terms: The products, summed in order.
        out_first: Whether the base stores the layer's weight as [out, in].
        shared: State that all tensors of the adapter share.
    """

    terms: tuple[Term, ...]
    out_first: bool
    shared: Shared = field(compare=False, repr=False)

    @property
    def is_delta(self) -> bool:
        """True."""
        return True

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """All factors."""
        return tuple(dict.fromkeys(each for term in self.terms for each in (term.a, term.b)))

    @property
    def held(self) -> int:
        """All factors twice: as they are read, and as they are cached."""
        return 2 * self.dtype.nbytes(sum(term.held for term in self.terms))

    def factors(self) -> list[tuple[Array, Array, float, int]]:
        """For each term: the left and the right matrix (contiguous), the scale, and the first element."""
        found: list[tuple[Array, Array, float, int]] = self.shared.recent.get(self, self._load)
        return found

    def _load(self) -> list[tuple[Array, Array, float, int]]:
        kind = self.dtype.compute
        loaded = []
        for term in self.terms:
            b, a = term.factors(self.shared)
            left, right = (b, a) if self.out_first else (a.T, b.T)
            matrices = np.ascontiguousarray(left, kind), np.ascontiguousarray(right, kind)
            loaded.append((*matrices, term.scale, term.first))
        return loaded

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        from modelfuse.kernels.compiled.low_rank import add_low_rank

        factors = self.factors()

        def read(start: int, buffer: Buffer) -> None:
            out = np.frombuffer(buffer, self.dtype.compute)
            out[:] = 0
            for left, right, scale, first in factors:
                begin, end = max(first, start), min(first + len(left) * right.shape[1], start + out.size)
                if begin < end:
                    part = out[begin - start : end - start]
                    add_low_rank(left, right, left.dtype.type(scale), begin - first, part)

        yield read


@dataclass(frozen=True, slots=True)
class ComputedTensor(StoredTensor):
    """A small tensor that is computed whole in memory: scaled, transposed, or a slice of a fused one.

    Attributes:
        source: The source.
        scale: The factor of a difference; None for a tensor that replaces the base's.
        turns: Whether to transpose.
        cut: The outputs to take, None for all.
        outputs_last: Whether the source has its outputs along the last axis, as Paddle's weights.
        shared: State that all tensors of the adapter share.
    """

    source: StoredTensor
    scale: float | None
    turns: bool
    cut: FusedPart | None
    outputs_last: bool
    shared: Shared = field(compare=False, repr=False)

    @property
    def is_delta(self) -> bool:
        """Whether it is scaled."""
        return self.scale is not None

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The source."""
        return (self.source,)

    @property
    def held(self) -> int:
        """The whole tensor twice: as it is read, and as it is cached."""
        return self.source.nbytes + 2 * self.nbytes + self.source.held

    def _make(self) -> Array:
        values = load(self.source, self.shared.strict)
        if self.cut is not None:
            values = self.cut.apply(values.T if self.outputs_last else values)
            values = values.T if self.outputs_last else values
        values = values.T if self.turns else values
        if self.scale is not None:
            values = values * values.dtype.type(self.scale)
        return np.ascontiguousarray(values, self.dtype.compute).ravel()

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        values: Array = self.shared.recent.get(self, self._make)

        def read(start: int, buffer: Buffer) -> None:
            out = np.frombuffer(buffer, values.dtype)
            out[:] = values[start : start + out.size]

        yield read


@dataclass(frozen=True, slots=True)
class Widened(StoredTensor):
    """A tensor read as float64, to compare it with one of another type.

    Attributes:
        source: The tensor.
    """

    source: StoredTensor

    @classmethod
    def of(cls, source: StoredTensor) -> Widened:
        """The tensor in float64."""
        return cls(source.name, F64, source.shape, source.file, 0, source)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        with self.source.open() as source:

            def read(start: int, buffer: Buffer) -> None:
                out = np.frombuffer(buffer, np.float64)
                out[:] = read_values(source, self.source.dtype, start, out.size)

            yield read
