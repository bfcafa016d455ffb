"""Differences of LoHa and LoKr adapters, computed on read.

LoHa: scale·(A₁·B₁)∘(A₂·B₂), element by element (Hyeon-Woo et al. 2022, arXiv 2108.06098). LoKr: scale·W₁⊗W₂, where
either may be a product A·B (Edalati et al. 2022, arXiv 2212.10650). Of convolutions, B may be a core tensor times B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, load
from modelfuse.checkpoints.adapters.low_rank_terms import Shared, difference_type
from modelfuse.checkpoints.tensors import Reader
from modelfuse.storage.files import Buffer

#: Elements that are computed at a time.
PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Factors:
    """A matrix, or two factors of it.

    Attributes:
        whole: The matrix [out, in]; further dimensions count as inputs.
        left: [out, rank]; with a core, [rank, out].
        right: [rank, in].
        core: [rank, rank, height, width] of a convolution.
    """

    whole: StoredTensor | None = None
    left: StoredTensor | None = None
    right: StoredTensor | None = None
    core: StoredTensor | None = None

    @classmethod
    def of(cls, parts: Mapping[str, StoredTensor], name: str, core: str) -> Factors:
        """The factors among an adapter's tensors whose names begin with ``name``."""
        return cls(parts.get(name), parts.get(f"{name}_a"), parts.get(f"{name}_b"), parts.get(core))

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All that there are."""
        return tuple(each for each in (self.whole, self.left, self.right, self.core) if each is not None)

    @property
    def shape(self) -> tuple[int, int] | None:
        """The matrix's shape; None if its factors do not match."""
        if self.whole is not None:
            return (self.whole.shape[0], self.whole.size // self.whole.shape[0]) if self.whole.size else None
        assert self.left is not None
        assert self.right is not None
        if len(self.left.shape) != 2 or len(self.right.shape) != 2 or not self.left.size * self.right.size:
            return None
        ranks, kernel = (self.left.shape[1], self.right.shape[0]), 1
        if self.core is not None:
            if len(self.core.shape) != 4 or self.core.shape[:2] != (self.left.shape[0], self.right.shape[0]):
                return None
            ranks, kernel = (self.left.shape[0], self.core.shape[0]), self.core.shape[2] * self.core.shape[3]
        outputs = self.left.shape[1 if self.core is not None else 0]
        return (outputs, self.right.shape[1] * kernel) if ranks[0] == ranks[1] else None

    def matrix(self, kind: str, strict: bool) -> Array:
        """The matrix."""
        if self.whole is not None:
            return load(self.whole, strict).astype(kind, copy=False).reshape(self.whole.shape[0], -1)
        left, right = self.pair(kind, strict)
        out = np.zeros(len(left) * right.shape[1], left.dtype)
        _add(left, right, 0, out)
        return out.reshape(len(left), -1)

    def pair(self, kind: str, strict: bool) -> tuple[Array, Array]:
        """The two factors, if it is not stored whole."""
        assert self.left is not None
        assert self.right is not None
        left, right = (load(each, strict).astype(kind, copy=False) for each in (self.left, self.right))
        if self.core is not None:
            core = load(self.core, strict).astype(kind, copy=False)
            left = left.T
            product = np.zeros((core.shape[0], right.shape[1], *core.shape[2:]), kind)
            for rank, row in enumerate(right):  # Sequentially, so that the bits do not depend on a library.
                product += core[:, rank, None] * row[None, :, None, None]
            right = product.reshape(core.shape[0], -1)
        return np.ascontiguousarray(left), np.ascontiguousarray(right)


@dataclass(frozen=True, slots=True)
class ProductTensor(StoredTensor):
    """A difference to the base, given by two matrices.

    Attributes:
        kind: ``hada`` or ``lokr``.
        one: The first matrix.
        other: The second.
        scale: The factor of the product.
        out_first: Whether the base stores the weight as [out, in].
        shared: State that all tensors of the adapter share.
    """

    kind: str
    one: Factors
    other: Factors
    scale: float
    out_first: bool
    shared: Shared = field(compare=False, repr=False)

    @property
    def is_delta(self) -> bool:
        """True."""
        return True

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """All parts."""
        return self.one.tensors + self.other.tensors

    @property
    def held(self) -> int:
        """All parts twice, both matrices of a Kronecker product, and pieces of it."""
        kept = 2 * sum(each.size for each in self.made_of) + 6 * min(PIECE, self.size)
        if self.kind == "lokr":
            kept += sum(2 * shape[0] * shape[1] for shape in (self.one.shape, self.other.shape) if shape is not None)
        return self.dtype.nbytes(kept)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        fill: Callable[[int, Array], None] = self.shared.recent.get(self, self._prepare)

        def read(start: int, buffer: Buffer) -> None:
            whole = np.frombuffer(buffer, self.dtype.compute)
            for begin in range(0, whole.size, PIECE):
                out = whole[begin : begin + PIECE]
                fill(start + begin, out)
                out *= out.dtype.type(self.scale)

        yield read

    def _prepare(self) -> Callable[[int, Array], None]:
        kind, strict = str(self.dtype.compute), self.shared.strict
        if self.kind == "lokr":
            first, second = self.one.matrix(kind, strict), self.other.matrix(kind, strict)
            return partial(_kronecker, *((first, second) if self.out_first else (first.T, second.T)))
        one, other = self.one.pair(kind, strict), self.other.pair(kind, strict)
        return partial(_hadamard, *((one, other) if self.out_first else (_turned(*one), _turned(*other))))


def product(
    parts: Mapping[str, StoredTensor], kind: str, base: StoredTensor, scale: float, ways: Sequence[bool], shared: Shared
) -> ProductTensor | None:
    """The difference to a tensor of the base; None if the adapter's tensors do not fit it.

    Args:
        parts: The adapter's tensors, by PEFT's names.
        kind: ``hada`` or ``lokr``.
        base: The base's tensor.
        scale: The factor of the product.
        ways: Whether the base stores it as [out, in]: the answers to try.
        shared: What is shared with the adapter's other tensors.
    """
    if kind == "hada":
        one, other = (Factors.of(parts, f"hada_w{number}", f"hada_t{number}") for number in (1, 2))
    else:
        one, other = Factors.of(parts, "lokr_w1", ""), Factors.of(parts, "lokr_w2", "lokr_t2")
    if one.shape is None or other.shape is None or len(base.shape) < 2 or (kind == "hada" and one.shape != other.shape):
        return None
    shape = one.shape if kind == "hada" else (one.shape[0] * other.shape[0], one.shape[1] * other.shape[1])
    stored = (base.shape[0], math.prod(base.shape[1:]))
    for out_first in ways:
        if (shape if out_first else shape[::-1]) == stored:
            dtype = difference_type(*one.tensors, *other.tensors)
            first = one.tensors[0]
            return ProductTensor(
                base.name, dtype, base.shape, first.file, 0, kind, one, other, scale, out_first, shared
            )
    return None


def _turned(left: Array, right: Array) -> tuple[Array, Array]:
    """The factors of the transpose."""
    return np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)


def _hadamard(one: tuple[Array, Array], other: tuple[Array, Array], start: int, out: Array) -> None:
    second = np.zeros_like(out)
    out[:] = 0
    _add(*one, start, out)
    _add(*other, start, second)
    out *= second


def _kronecker(one: Array, other: Array, start: int, out: Array) -> None:
    rows, columns = np.divmod(np.arange(start, start + out.size), one.shape[1] * other.shape[1])
    out[:] = one[rows // len(other), columns // other.shape[1]]
    out *= other[rows % len(other), columns % other.shape[1]]


def _add(left: Array, right: Array, first: int, out: Array) -> None:
    from modelfuse.kernels.compiled.low_rank import add_low_rank

    add_low_rank(left, right, left.dtype.type(1), first, out)
