"""The two factors of a merged difference, as tensors that are computed on read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, load, read_values
from modelfuse.checkpoints.adapters.computed_tensors import LowRankTensor
from modelfuse.checkpoints.adapters.core_space import MergedProducts, cut, merge_in_core
from modelfuse.checkpoints.adapters.low_rank_terms import Shared, difference_type
from modelfuse.checkpoints.tensors import Reader
from modelfuse.errors import CheckpointError
from modelfuse.kernels.matrices import Matrices, memory_of
from modelfuse.methods.applied import Applied
from modelfuse.methods.random import stream_key
from modelfuse.storage.files import Buffer

#: Differences whose factors are cached. This many A precede their B, so that workers factorize concurrently and each
#: difference is factorized once.
RUN = 16
#: Elements of a tensor that are merged at a time.
PIECE = 1 << 20
#: Approximate number of such tensors of a model.
TENSORS = 100


@dataclass(frozen=True, slots=True)
class DifferenceTensor(StoredTensor):
    """A model's difference to the base.

    Attributes:
        source: The model's tensor.
        base: The base's.
    """

    source: StoredTensor
    base: StoredTensor

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """Both."""
        return self.source, self.base

    @property
    def held(self) -> int:
        """The sum of both tensors'."""
        return self.source.held + self.base.held

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        with self.source.open() as source, self.base.open() as base:

            def read(start: int, buffer: Buffer) -> None:
                out = np.frombuffer(buffer, self.dtype.compute)
                with np.errstate(all="ignore"):
                    out[:] = read_values(source, self.source.dtype, start, out.size)
                    out -= read_values(base, self.base.dtype, start, out.size)

            yield read


@dataclass(frozen=True, slots=True)
class Factoring:
    """One merged difference B·A.

    Attributes:
        name: The base's tensor.
        sources: Each model's difference.
        method: The method that merges them.
        rank: The rank to find; None for the sum of the products' ranks, which is exact.
        in_core: Whether all differences are products, merged by a method of whole matrices without making these.
        out_first: Whether the base stores the weight as [out, in].
        matrices: How it is split into matrices, for whole-matrix methods.
        shared: State that all factorings share.
        errors: Receives the relative error, by name.
        kept: The number of singular values to keep of that rank; None: all.
        distributes: Whether A and B are scaled by the square roots of the singular values; else A by all of them.
    """

    name: str
    sources: tuple[StoredTensor, ...]
    method: Applied
    rank: int | None
    in_core: bool
    out_first: bool
    matrices: Matrices | None
    shared: Shared = field(compare=False, repr=False)
    errors: dict[str, float] = field(compare=False, repr=False)
    kept: int | None = None
    distributes: bool = True

    @property
    def elements(self) -> int:
        """Elements of the difference that are in memory at once."""
        return 0 if self.rank is None or self.in_core else self.sources[0].size

    @property
    def products(self) -> MergedProducts:
        """What is merged in the space that it spans."""
        assert self.matrices is not None
        return MergedProducts(self.name, self.sources, self.method, self.matrices, self.shared)

    def factors(self) -> tuple[Array, Array]:
        """B of shape (out, rank) and A of shape (rank, in)."""
        make = self._in_core if self.in_core else self._exact if self.rank is None else self._nearest
        found: tuple[Array, Array] = self.shared.recent.get(self, make)
        return found

    def _in_core(self) -> tuple[Array, Array]:
        """In the space that the products span; all of it, or what is nearest of the rank."""
        b, a = merge_in_core(**vars(self.products))
        b = b * self.method.factor
        self.errors[self.name] = 0.0
        if self.rank is not None:
            b, a, self.errors[self.name] = cut(b, a, min(self.rank, self.kept or self.rank), self.distributes)
        return b, a

    def _exact(self) -> tuple[Array, Array]:
        """The concatenated products: Σ wᵢ·sᵢ·Bᵢ·Aᵢ = [w₁s₁B₁ w₂s₂B₂ …]·[A₁; A₂; …]."""
        pairs = []
        for source, weight in zip(self.sources, self.method.coefficients or (), strict=True):
            for term in source.terms if isinstance(source, LowRankTensor) else ():
                b, a = term.factors(self.shared)
                pairs.append((b * b.dtype.type(weight * term.scale), a))
        self.errors[self.name] = 0.0
        return np.concatenate([b for b, _ in pairs], axis=1), np.concatenate([a for _, a in pairs])

    def _nearest(self) -> tuple[Array, Array]:
        from modelfuse.kernels.compiled.low_rank import add_low_rank
        from modelfuse.kernels.compiled.truncated_svd import factorize

        whole = merge_whole(self.name, self.sources, self.method, self.shared.strict, self.matrices)
        matrix = whole.reshape(self.sources[0].shape[0], -1)
        left, right = factorize(matrix, self.rank or 1, stream_key(0, 0, self.name))
        left, right = left[:, : self.kept], right[: self.kept]
        if not self.distributes:
            left, right = self._undistributed(left, right)
        left, right = (np.ascontiguousarray(each, whole.dtype) for each in (left, right))
        size = np.linalg.norm(whole.astype(np.float64))
        add_low_rank(left, right, whole.dtype.type(-1), 0, whole)
        missing = np.linalg.norm(whole.astype(np.float64))
        self.errors[self.name] = float(missing / size) if size else 0.0
        return (left, right) if self.out_first else (np.ascontiguousarray(right.T), np.ascontiguousarray(left.T))

    def _undistributed(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Move the singular values to A, whichever of the two factors that is."""
        sizes = np.sqrt(np.square(left).sum(axis=0))
        shares = np.where(sizes > 0, sizes, 1.0)
        if self.out_first:
            return left / shares, right * sizes[:, None]
        return left * sizes, right / shares[:, None]

    def larger_than(self, epsilon: float) -> int:
        """The number of singular values above ``epsilon``; reads the difference."""
        b, a = (np.asarray(each, np.float64) for each in self.factors())
        sizes = np.sqrt(np.square(b).sum(axis=0) * np.square(a).sum(axis=1))
        return int(np.count_nonzero(sizes > epsilon))


@dataclass(frozen=True, slots=True)
class FactorTensor(StoredTensor):
    """A or B of a merged difference.

    Attributes:
        factoring: The factorization.
        part: Which of the two factors.
    """

    factoring: Factoring
    part: Literal["A", "B"]

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """All differences."""
        return self.factoring.sources

    @property
    def held(self) -> int:
        """The difference in float32 and float64, the memory of its sources, and the cached factors."""
        sources = sum(source.held for source in self.factoring.sources)
        pieces = PIECE * 4 * (len(self.factoring.sources) + 1) if self.factoring.elements else 0
        pieces += self.factoring.products.memory if self.factoring.in_core else 0
        return 12 * self.factoring.elements + pieces + sources + (24 + 2 * RUN) * self.size + self._matrices

    @property
    def _matrices(self) -> int:
        how, matrices = self.factoring.method.combination.matrix, self.factoring.matrices
        if how is None or matrices is None or self.factoring.in_core:
            return 0
        return memory_of(matrices, how, len(self.factoring.sources))

    @property
    def facts(self) -> Mapping[str, object]:
        """The relative error of the product, once it is known."""
        errors = self.factoring.errors
        return {"relative_error": errors[self.factoring.name]} if self.factoring.name in errors else {}

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        b, a = self.factoring.factors()
        values = np.ascontiguousarray(a if self.part == "A" else b, self.dtype.compute).ravel()

        def read(start: int, buffer: Buffer) -> None:
            out = np.frombuffer(buffer, self.dtype.compute)
            out[:] = values[start : start + out.size]

        yield read


@dataclass(frozen=True, slots=True)
class WholeTensor(StoredTensor):
    """A small tensor of several models merged whole, base and all.

    Attributes:
        key: The tensor's name in the base; random draws depend on it.
        sources: Each model's tensor, then the base's.
        method: The method that merges them.
        shared: State that all tensors of the output share.
    """

    key: str
    sources: tuple[StoredTensor, ...]
    method: Applied
    shared: Shared = field(compare=False, repr=False)

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """All of them."""
        return self.sources

    @property
    def held(self) -> int:
        """The whole tensor, and the memory of its sources."""
        return 12 * self.size + PIECE * 4 * (len(self.sources) + 1) + sum(each.held for each in self.sources)

    def _make(self) -> Array:
        *models, base = self.sources
        differences = tuple(each if each.is_delta else difference(each, base) for each in models)
        whole = merge_whole(self.key, differences, self.method, self.shared.strict)
        whole += load(base, self.shared.strict).ravel()
        return whole

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        values: Array = self.shared.recent.get(self, self._make)

        def read(start: int, buffer: Buffer) -> None:
            out = np.frombuffer(buffer, self.dtype.compute)
            out[:] = values[start : start + out.size]

        yield read


def difference(source: StoredTensor, base: StoredTensor) -> StoredTensor:
    """A model's difference to the base."""
    if source.is_delta:
        return source
    return DifferenceTensor(
        base.name, difference_type(source, base), base.shape, source.file, 0, source, base
    )  # fmt: skip


def merge_whole(
    name: str, sources: Sequence[StoredTensor], method: Applied, strict: bool, matrices: Matrices | None = None
) -> Array:
    """Merge one tensor's differences in memory, in one thread; returns float32 or float64, shape (elements,).

    Raises:
        CheckpointError: If ``strict`` and a difference is not finite.
    """
    from modelfuse.kernels import Pass, Work, span_of, steps_of
    from modelfuse.kernels.adaptive import SMALL, shared_kernel
    from modelfuse.kernels.procedures import run_through

    size, dtypes = sources[0].size, tuple(source.dtype for source in sources)
    kind = difference_type(*sources)
    merged = np.empty(kind.nbytes(size), np.uint8)
    most = max(PIECE, matrices.window if matrices is not None else 0)
    raws = np.empty((len(sources), most * max(dtype.bytes for dtype in dtypes)), np.uint8)
    # A model has hundreds of such tensors: compiling pays off for large ones.
    kernel = shared_kernel(TENSORS * sum(dtype.nbytes(size) for dtype in dtypes) < SMALL)
    work = Work(name, size, dtypes, False, kind, method, matrices=matrices, shape=sources[0].shape)
    with ExitStack() as files:
        files.enter_context(kernel.running())
        readers = [files.enter_context(source.open()) for source in sources]

        def walk(pass_: Pass) -> list[Any]:
            found = []
            for first in range(0, size, span := span_of(pass_, PIECE)):
                state = pass_.start()
                for start, count, _ in steps_of(pass_, state, first, min(span, size - first), PIECE):
                    for reader, source, raw in zip(readers, sources, raws, strict=True):
                        reader(start, raw[: source.dtype.nbytes(count)].data)
                    pass_.apply(state, start, count, raws, merged[kind.nbytes(start) : kind.nbytes(start + count)])
                if strict and state.bad.any():
                    raise CheckpointError(f"Tensor {name!r}: a difference holds NaN or infinite values")
                found.append(pass_.finish(state))
            return found

        run_through(kernel.merge(work), walk)
    return merged.view(np.dtype(kind.compute))
