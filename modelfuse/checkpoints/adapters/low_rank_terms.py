"""Scaled products of an adapter's two factors, as they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, Recent, load
from modelfuse.dtypes import DType, computed_in


class FusedPart(NamedTuple):
    """Which outputs of a fused layer belong to one of its parts.

    Attributes:
        groups: Into how many equal groups the fused outputs fall.
        per_group: Fused outputs a group.
        begin: The part's first output in each.
        width: How many it has in each.
        widens: Whether an adapter of the part is laid into the fused layer, zero elsewhere; otherwise one of the
            fused layer is cut.
    """

    groups: int
    per_group: int
    begin: int
    width: int
    widens: bool

    @property
    def outputs(self) -> int:
        """How many outputs the layer that the adapter is placed on has."""
        return self.groups * (self.per_group if self.widens else self.width)

    def apply(self, outputs: Array) -> Array:
        """Select or lay out along the first axis."""
        part = slice(self.begin, self.begin + self.width)
        if not self.widens:
            return outputs.reshape(self.groups, self.per_group, -1)[:, part].reshape(self.outputs, *outputs.shape[1:])
        wide = np.zeros((self.groups, self.per_group, math.prod(outputs.shape[1:])), outputs.dtype)
        wide[:, part] = outputs.reshape(self.groups, self.width, -1)
        return wide.reshape(self.outputs, *outputs.shape[1:])


class ExpertIndex(NamedTuple):
    """Which of several experts' factors are meant, where all are stored together.

    Attributes:
        number: The expert.
        of: How many there are.
    """

    number: int
    of: int


@dataclass(frozen=True, slots=True)
class Term:
    """One product scale·B·A.

    Attributes:
        a: A: [rank, in], or [in, rank] as Paddle stores it; further dimensions count as inputs. Of several experts:
            their A one below the other, or [experts, in, rank] as Paddle stores them.
        b: B: [out, rank], or [rank, out] as Paddle stores it; further dimensions are of size one. Of several experts:
            [out, rank·experts], the experts' columns in turn, or [experts, rank, out].
        transposed: Whether both are as Paddle stores them.
        scale: What the product is multiplied by.
        cut: Which outputs to take, None for all.
        expert: Whose factors to take of several experts'.
        first: The element of the base's tensor that the product begins at.
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
        """The number of outputs of the layer, of those that are taken."""
        return self.cut.outputs if self.cut is not None else self.b.size // self._experts // self.rank

    @property
    def size(self) -> int:
        """The number of elements of the product."""
        return self.inputs * self.outputs

    @property
    def held(self) -> int:
        """Elements that are kept to compute it."""
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


@dataclass(frozen=True, slots=True)
class Shared:
    """What the tensors of one adapter share.

    Attributes:
        strict: Whether factors that are not finite are an error.
        recent: Factors in use.
        experts: Factors of all experts together that are in use: those of a layer are wanted one after another.
    """

    strict: bool
    recent: Recent = field(default_factory=Recent)
    experts: Recent = field(default_factory=lambda: Recent(most=4))


def difference_type(*parts: StoredTensor) -> DType:
    """The type that a tensor computed from these reads in."""
    return computed_in(*(part.dtype for part in parts))
