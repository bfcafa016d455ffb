"""Scaled products of an adapter's two factors, as they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, Recent, load
from modelfuse.dtypes import DType, computed_in


class Cut(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class Term:
    """One product scale·B·A.

    Attributes:
        a: A: [rank, in], or [in, rank] as Paddle stores it; further dimensions count as inputs.
        b: B: [out, rank], or [rank, out] as Paddle stores it; further dimensions are of size one.
        transposed: Whether both are as Paddle stores them.
        scale: What the product is multiplied by.
        cut: Which outputs to take, None for all.
    """

    a: StoredTensor
    b: StoredTensor
    transposed: bool
    scale: float
    cut: Cut | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return self.a.shape[-1 if self.transposed else 0]

    @property
    def inputs(self) -> int:
        """The number of inputs of the layer."""
        return self.a.size // self.rank

    @property
    def outputs(self) -> int:
        """The number of outputs of the layer, of those that are taken."""
        return self.cut.outputs if self.cut is not None else self.b.size // self.rank

    def factors(self, strict: bool) -> tuple[Array, Array]:
        """B of shape (out, rank) and A of shape (rank, in)."""
        kind = computed_in(self.a.dtype, self.b.dtype).compute
        a, b = load(self.a, strict), load(self.b, strict)
        a = a.reshape(-1, self.rank).T if self.transposed else a.reshape(self.rank, -1)
        b = b.reshape(self.rank, -1).T if self.transposed else b.reshape(-1, self.rank)
        b = self.cut.apply(b) if self.cut is not None else b
        return b.astype(kind, copy=False), a.astype(kind, copy=False)


@dataclass(frozen=True, slots=True)
class Shared:
    """What the tensors of one adapter share.

    Attributes:
        strict: Whether factors that are not finite are an error.
        recent: Factors in use.
    """

    strict: bool
    recent: Recent = field(default_factory=Recent)


def difference_type(*parts: StoredTensor) -> DType:
    """The type that a tensor computed from these reads in."""
    return computed_in(*(part.dtype for part in parts))
