"""Whole-matrix methods on low-rank differences, without forming the large matrices (core space merging).

All differences Bᵢ·Aᵢ lie in the span of the Bᵢ on one side and of the Aᵢ on the other. In orthonormal bases of both,
they are small matrices, whose size is the sum of the ranks (Panariello et al. 2025, arXiv:2509.17786). A method that
commutes with rotations gives exactly the same result there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array
from modelfuse.checkpoints.adapters.computed_tensors import LowRankTensor
from modelfuse.checkpoints.adapters.low_rank_terms import Shared
from modelfuse.kernels.blas_threads import one_thread
from modelfuse.kernels.matrices import Matrices
from modelfuse.kernels.small_matrices import merge_matrices
from modelfuse.methods.applied import Applied
from modelfuse.methods.spec import Floats


@dataclass(frozen=True)
class MergedProducts:
    """The merged difference of products to a base's tensor.

    Attributes:
        name: The tensor.
        sources: Each model's difference; one that is not a product is zero.
        method: A whole-matrix method.
        matrices: How the tensor is split; one unit.
        shared: The state to read factors with.
    """

    name: str
    sources: tuple[StoredTensor, ...]
    method: Applied
    matrices: Matrices
    shared: Shared = field(compare=False, repr=False)

    @property
    def memory(self) -> int:
        """Memory of both stacks of factors in float64, their bases and the decompositions."""
        terms = [term for source in self.sources if isinstance(source, LowRankTensor) for term in source.terms]
        ranks = sum(term.rank for term in terms)
        sides = max((term.inputs + term.outputs for term in terms), default=0)
        return 8 * 6 * ranks * (sides + len(self.sources) ** 2 * ranks)

    def factors(self) -> tuple[Floats, Floats]:
        """The factors in the tensor's orientation."""
        b, a = merge_in_core(self.name, self.sources, self.method, self.matrices, self.shared)
        return (b, a) if self.matrices.out_first else (a.T, b.T)


def products_rank(sources: Sequence[StoredTensor], base: StoredTensor) -> int | None:
    """The sum of the ranks of all products; None if a difference to the base is not a product."""
    rank = 0
    for source in sources:
        if isinstance(source, LowRankTensor):
            rank += sum(term.rank for term in source.terms)
        elif source != base and getattr(source, "source", None) != base:
            return None
    return rank


def fits_core(sources: Sequence[StoredTensor], base: StoredTensor, method: Applied, matrices: Matrices | None) -> bool:
    """Whether a tensor can be merged in the space spanned by its products."""
    how = method.combination.matrix
    if matrices is None or matrices.units != 1 or how is None or how.gram not in ("sum", "each", "pairs"):
        return False
    terms = [term for source in sources if isinstance(source, LowRankTensor) for term in source.terms]
    fit = all(term.inputs == matrices.inputs and term.size == base.size and not term.first for term in terms)
    return bool(terms) and fit and products_rank(sources, base) is not None


def in_core(
    name: str,
    sources: Sequence[StoredTensor],
    base: StoredTensor,
    method: Applied,
    matrices: Matrices | None,
    strict: bool,
) -> Matrices | None:
    """How a tensor is split, with its merged difference if it can be computed from products.

    Args:
        name: The tensor.
        sources: The models' tensors.
        base: The base's.
        method: The method that merges them.
        matrices: How it is split, for whole-matrix methods.
        strict: Whether non-finite factors are an error.
    """
    if matrices is None or not fits_core(sources, base, method, matrices):
        return matrices
    return replace(matrices, merged=MergedProducts(name, tuple(sources), method, matrices, Shared(strict)))


def merge_in_core(
    name: str, sources: Sequence[StoredTensor], method: Applied, matrices: Matrices, shared: Shared
) -> tuple[Floats, Floats]:
    """The merged difference as B of shape (out, rank) and A of shape (rank, in).

    The rows of A are orthonormal, unless there are fewer outputs.

    Args:
        name: The tensor.
        sources: Each model's difference; one that is no product is zero.
        method: A method of whole matrices.
        matrices: How the tensor is cut; one unit.
        shared: What the factors are read with.

    Raises:
        ModelfuseError: If a decomposition fails.
    """
    pairs = [_factors(source, shared) for source in sources]
    ranks = [sum(len(a) for _, a in own) for own in pairs]
    rights = np.vstack([a for own in pairs for _, a in own]).astype(np.float64)
    lefts = np.hstack([b for own in pairs for b, _ in own])
    outputs, inputs = len(lefts), matrices.inputs
    rank = min(sum(ranks), inputs)
    if np.isfinite(rights).all() and np.isfinite(lefts).all():
        with one_thread():
            basis, upper = np.linalg.qr(rights.T)
        b, a = np.zeros((outputs, rank)), np.ascontiguousarray(basis.T)
        for chosen in matrices.outputs:
            b[chosen] = _part(name, lefts[chosen], upper, ranks, method, inputs)
    else:
        b, a = np.full((outputs, rank), np.nan), np.full((rank, inputs), np.nan)
    return (b, a) if rank <= outputs else (np.eye(outputs), b @ a)


def _factors(source: StoredTensor, shared: Shared) -> list[tuple[Floats, Array]]:
    """Scaled B, and A, of each product of a difference."""
    terms = source.terms if isinstance(source, LowRankTensor) else ()
    found = [(*term.factors(shared), term.scale) for term in terms]
    return [(b.astype(np.float64) * scale, a) for b, a, scale in found]


def _part(name: str, lefts: Floats, upper: Floats, ranks: Sequence[int], method: Applied, inputs: int) -> Floats:
    """The merged outputs of one layer, in the basis of the inputs."""
    with one_thread():
        side, lower = np.linalg.qr(lefts)
    ends = np.cumsum(ranks)
    cores = [lower[:, end - rank : end] @ upper[:, end - rank : end].T for rank, end in zip(ranks, ends, strict=True)]
    of_columns = inputs <= len(lefts)
    # Methods may count directions by the size of the smaller side: as of the large matrix, each model has all of its.
    size = min(len(ranks) * max(ranks), inputs, len(lefts))
    rows, columns = cores[0].shape
    padded = np.zeros((len(cores), rows, size) if of_columns else (len(cores), size, columns))
    padded[:, :rows, :columns] = cores
    made: Floats = side @ merge_matrices(name, padded, method, of_columns, inputs)[:rows, :columns]
    return made


def cut(b: Floats, a: Floats, rank: int, distributes: bool) -> tuple[Floats, Floats, float]:
    """The best approximation of a product by a smaller rank, and its relative error.

    Args:
        b: Shape (out, more).
        a: Shape (more, in); of as many rows as columns of ``b``.
        rank: The rank.
        distributes: Whether both factors are scaled by the square roots of the singular values; else A by all of them.
    """
    if not np.isfinite(b).all():
        return b[:, :rank], a[:rank], np.nan
    with one_thread():
        basis, upper = np.linalg.qr(a.T)
        left, sizes, right = np.linalg.svd(b @ upper.T, full_matrices=False)
        right = right @ basis.T
    # The sign of a singular vector is arbitrary: its largest element is made positive.
    signs = np.sign(np.take_along_axis(right, np.abs(right).argmax(1)[:, None], 1))
    left, right = (left * signs[:, 0])[:, :rank], (right * signs)[:rank]
    whole, halves = float(np.linalg.norm(sizes)), np.sqrt(sizes[:rank])
    error = float(np.linalg.norm(sizes[rank:])) / whole if whole else 0.0
    shares = halves if distributes else np.ones_like(halves)
    return left * shares, (sizes[:rank] / np.where(shares > 0, shares, 1))[:, None] * right, error
