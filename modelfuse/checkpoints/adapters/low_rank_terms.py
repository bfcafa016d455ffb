"""Scaled products of an adapter's two factors, as they are stored."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from msgspec import Struct, field

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, Recent, load
from modelfuse.dtypes import DType, computed_in


class FusedPart(NamedTuple):
    """The outputs of a fused layer that belong to one of its parts.

    Attributes:
        groups: The number of equal groups of fused outputs.
        per_group: Fused outputs per group.
        begin: The part's first output in each group.
        width: The number of its outputs in each group.
        widens: Whether an adapter of the part is extended to the fused layer with zeros; otherwise an adapter of the
            fused layer is sliced.
    """

    groups: int
    per_group: int
    begin: int
    width: int
    widens: bool

    @property
    def outputs(self) -> int:
        """The number of outputs of the layer that the adapter is applied to."""
        return self.groups * (self.per_group if self.widens else self.width)

    def apply(self, outputs: Array) -> Array:
        """Slice, or extend with zeros, along the first axis."""
        part = slice(self.begin, self.begin + self.width)
        if not self.widens:
            return outputs.reshape(self.groups, self.per_group, -1)[:, part].reshape(self.outputs, *outputs.shape[1:])
        wide = np.zeros((self.groups, self.per_group, math.prod(outputs.shape[1:])), outputs.dtype)
        wide[:, part] = outputs.reshape(self.groups, self.width, -1)
        return wide.reshape(self.outputs, *outputs.shape[1:])


class ExpertIndex(NamedTuple):
    """One expert among stacked factors.

    Attributes:
        number: The index of the expert.
        of: The number of experts.
    """

    number: int
    of: int


class Term(Struct, frozen=True):
    """One product scale·B·A.

    Attributes:
        a: A: [rank, in], or [in, rank] as Paddle stores it; further dimensions count as inputs. For several
            experts: their A stacked vertically, or [experts, in, rank] as Paddle stores them.
        b: B: [out, rank], or [rank, out] as Paddle stores it; further dimensions are of size one. For several
            experts: [out, rank·experts] with interleaved columns, or [experts, rank, out].
        transposed: Whether both are as Paddle stores them.
        scale: The factor of the product.
        cut: The outputs to take, None for all.
        expert: The expert whose factors to take, if several are stacked.
        first: The index in the base's tensor of the product's first element.
    """

    a: StoredTensor
    b: StoredTensor
    transposed: bool
    scale: float
    cut: FusedPart | None = None
    expert: ExpertIndex | None = None
    first: int = 0

    @property
    def rank(self) -> int:
        """The rank."""
        if self.transposed:
            return self.a.shape[-1]
        return self.a.shape[0] // self._experts

    @property
    def inputs(self) -> int:
        """The number of inputs of the layer."""
        return self.a.size // self._experts // self.rank

    @property
    def outputs(self) -> int:
        """The number of outputs of the layer that are taken."""
        return self.cut.outputs if self.cut is not None else self.b.size // self._experts // self.rank

    @property
    def size(self) -> int:
        """The number of elements of the product."""
        return self.inputs * self.outputs

    @property
    def held(self) -> int:
        """Elements that are in memory to compute it."""
        return self.rank * (self.inputs + self.outputs) + (self.a.size + self.b.size if self.expert else 0)

    @property
    def _experts(self) -> int:
        return self.expert.of if self.expert is not None else 1

    def factors(self, shared: Shared) -> tuple[Array, Array]:
        """B of shape (out, rank) and A of shape (rank, in)."""
        kind = computed_in(self.a.dtype, self.b.dtype).compute
        if self.expert is None:
            a, b = self._all_of(shared.strict)
        else:
            a, b = shared.experts.get((self.a, self.b), lambda: self._all_of(shared.strict))
        number = self.expert.number if self.expert is not None else 0
        left = self.cut.apply(b[number]) if self.cut is not None else b[number]
        return left.astype(kind, copy=False), a[number].astype(kind, copy=False)

    def _all_of(self, strict: bool) -> tuple[Array, Array]:
        """A of shape (experts, rank, in) and B of shape (experts, out, rank)."""
        a, b = load(self.a, strict), load(self.b, strict)
        if self.transposed:
            a, b = a.reshape(self._experts, -1, self.rank), b.reshape(self._experts, self.rank, -1)
            return a.transpose(0, 2, 1), b.transpose(0, 2, 1)
        a, b = a.reshape(self._experts, self.rank, -1), b.reshape(-1, self.rank, self._experts)
        return a, b.transpose(2, 0, 1)


class Shared(Struct, frozen=True):
    """State that all tensors of one adapter share.

    Attributes:
        strict: Whether non-finite factors are an error.
        recent: A cache of factors.
        experts: A cache of stacked factors of experts, which are used one expert after the other.
    """

    strict: bool
    recent: Recent = field(default_factory=Recent)
    experts: Recent = field(default_factory=lambda: Recent(most=4))


def difference_type(*parts: StoredTensor) -> DType:
    """The type that a tensor computed from these reads in."""
    return computed_in(*(part.dtype for part in parts))
