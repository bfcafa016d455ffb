"""Lines of a tensor: its rows, its columns, or the elements along any axis. Slices may cut them.

Elements are indexed as stored. Lines along the last axis are contiguous; others interleave: interleaving lines form a
*group*, and groups are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct

Array = np.ndarray[Any, Any]

#: Elements that are ranked at a time; at least one group.
TOGETHER = 1 << 17


class GroupRun(NamedTuple):
    """Consecutive elements: a part of one group, or several whole groups.

    Attributes:
        start: The index of the first element.
        stop: The index after the last one.
        whole: Whether they are whole groups.
    """

    start: int
    stop: int
    whole: bool


class Lines(Struct, frozen=True):
    """The lines along an axis.

    Attributes:
        length: Elements per line.
        inner: The stride of a line, which is also the number of interleaving lines.
        number: The number of lines.
    """

    length: int
    inner: int
    number: int

    @classmethod
    def along(cls, shape: Sequence[int], size: int, axis: int) -> Lines:
        """The lines of a tensor along an axis; without a shape, the tensor is one line."""
        shape = tuple(shape) if shape and math.prod(shape) == size else (size,)
        axis %= len(shape)
        return cls(shape[axis], math.prod(shape[axis + 1 :]), size // max(shape[axis], 1))

    @property
    def group(self) -> int:
        """Elements per group."""
        return self.length * self.inner

    def cut_by(self, slice_elements: int, size: int) -> int:
        """The most elements of groups that are cut by slices of ``slice_elements``, or of multiples of it, elements."""
        if slice_elements % self.group == 0:
            return 0
        return min(size, size // slice_elements * self.group)

    def numbers(self, first: int, count: int) -> Array:
        """The index of each element's line, int64, shape (count,)."""
        positions = np.arange(first, first + count)
        if self.inner == 1:
            return np.asarray(positions // self.length)
        return np.asarray(positions // self.group * self.inner + positions % self.inner)

    def parts(self, first: int, count: int) -> Iterator[GroupRun]:
        """Split consecutive elements at groups: the end of one, whole ones, the beginning of one."""
        stop = first + count
        begin, end = -(-first // self.group) * self.group, stop // self.group * self.group
        if begin > end:  # All within one group.
            yield GroupRun(first, stop, False)
            return
        edges = [(first, begin, False), (begin, end, True), (end, stop, False)]
        yield from (GroupRun(*edge) for edge in edges if edge[0] < edge[1])


def mean_ranks(values: Array) -> Array:
    """Ranks along axis 1 of a three-dimensional array, ascending from 0; equal values share their mean rank.

    >>> mean_ranks(np.array([5.0, 2.0, 5.0, 1.0]).reshape(1, 4, 1)).ravel().tolist()
    [2.5, 1.0, 2.5, 0.0]
    """
    order = np.argsort(values, axis=1, kind="stable")
    ascending = np.take_along_axis(values, order, 1)
    positions = np.broadcast_to(np.arange(values.shape[1])[:, None], values.shape)
    begins = np.ones(values.shape, np.bool_)
    begins[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    ends = np.ones(values.shape, np.bool_)
    ends[:, :-1] = begins[:, 1:]
    first = np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, positions, values.shape[1])[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, 1)
    return ranks


#: A piece of a group that slices cut: its first element's index, and magnitudes of shape (models, elements).
Fragment = tuple[int, Array]


class LineKeep:
    """The probability of keeping each element, by its magnitude's rank within its line.

    For lines that slices cut it is computed in advance; for the others, from the slice that contains them.

    Args:
        lines: The lines.
        probabilities: One function per model: maps ranks from 0 on, and the length of a line, to probabilities.
        compute: The type of the probabilities.
        fragments: All pieces of groups that slices cut.

    Attributes:
        lines: The lines.
        marks: What was kept of slices, by their first elements, as far as a backend knows it from an earlier pass.
    """

    def __init__(
        self,
        lines: Lines,
        probabilities: Sequence[Callable[[Array, int], Array]],
        compute: str,
        fragments: Sequence[Fragment],
    ) -> None:
        self.lines, self._probabilities, self._compute = lines, probabilities, compute
        self._cut: dict[int, Array] = {}
        self.marks: dict[int, Array] = {}
        pieces: dict[int, list[Fragment]] = {}
        for fragment in fragments:
            pieces.setdefault(fragment[0] // lines.group, []).append(fragment)
        for group, own in pieces.items():
            own.sort(key=lambda each: each[0])
            self._cut[group] = self._keep(np.concatenate([magnitudes for _, magnitudes in own], axis=1))

    def by_rank(self) -> Array:
        """The probabilities for all ranks, by twice the rank: shape (models, 2 · length − 1)."""
        ranks, length = np.arange(2 * self.lines.length - 1) / 2, self.lines.length
        return np.stack([each(ranks, length) for each in self._probabilities]).astype(self._compute)

    @property
    def cut(self) -> tuple[Array, Array]:
        """The numbers of the groups that slices cut, ascending, and their elements' probabilities, group by group."""
        groups = sorted(self._cut)
        keep = [self._cut[group] for group in groups] or [np.empty((len(self._probabilities), 0), self._compute)]
        return np.array(groups, np.int64), np.concatenate(keep, axis=1)

    def of(self, first: int, magnitudes: Array) -> Array:
        """The probabilities for consecutive elements of all models, shape (models, elements)."""
        keep, group = np.empty(magnitudes.shape, self._compute), self.lines.group
        for start, stop, whole in self.lines.parts(first, magnitudes.shape[1]):
            here = slice(start - first, stop - first)
            if whole:
                keep[:, here] = self._keep(magnitudes[:, here])
            else:
                begin = start // group * group
                keep[:, here] = self._cut[start // group][:, start - begin : stop - begin]
        return keep

    def _keep(self, magnitudes: Array) -> Array:
        """The same for whole groups, a few at a time."""
        keep = np.empty(magnitudes.shape, self._compute)
        length, step = self.lines.length, max(TOGETHER // self.lines.group, 1) * self.lines.group
        for own, values, probability in zip(keep, magnitudes, self._probabilities, strict=True):
            for start in range(0, values.size, step):
                ranks = mean_ranks(values[start : start + step].reshape(-1, length, self.lines.inner))
                own[start : start + step] = probability(ranks, length).ravel()
        return keep


class Accumulated(NamedTuple):
    """Sums along the lines of consecutive groups, and their rounding errors.

    Attributes:
        group: The index of the first group.
        sums: float64, shape (rows, groups, inner).
        lost: The same shape.
    """

    group: int
    sums: Array
    lost: Array


def add_exactly(one: Array, other: Array) -> tuple[Array, Array]:
    """Sums and their rounding errors: Knuth's two-sum (The Art of Computer Programming, volume 2, section 4.2.2)."""
    added = one + other
    of_other = added - one
    return added, (one - (added - of_other)) + (other - of_other)


def accumulate(parts: Sequence[Accumulated]) -> Accumulated:
    """Add up several parts, whose groups may overlap."""
    first = min(each.group for each in parts)
    last = max(each.group + each.sums.shape[1] for each in parts)
    rows, _, inner = parts[0].sums.shape
    sums, lost = np.zeros((rows, last - first, inner)), np.zeros((rows, last - first, inner))
    with np.errstate(all="ignore"):
        for each in parts:
            here = slice(each.group - first, each.group - first + each.sums.shape[1])
            sums[:, here], error = add_exactly(sums[:, here], each.sums)
            lost[:, here] += error + each.lost
    return Accumulated(first, sums, lost)


def line_sums(parts: Sequence[Accumulated]) -> Array:
    """The sums along all lines: float64, shape (rows, lines)."""
    whole = accumulate(parts)
    with np.errstate(all="ignore"):
        # The rounding error of an infinite sum is NaN.
        sums = np.where(np.isfinite(whole.sums), whole.sums + whole.lost, whole.sums)
    return np.asarray(sums.reshape(sums.shape[0], -1))
