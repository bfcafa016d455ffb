"""Lines of a tensor (its rows, its columns, whatever lies along an axis), which slices may cut.

Elements are numbered as they are stored. Lines along the last axis follow each other; others interleave: those that do
are a *group*, and groups follow each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

#: Elements that are ranked at a time, if groups are smaller.
TOGETHER = 1 << 17


class GroupRun(NamedTuple):
    """Consecutive elements: of one group, or of several whole ones.

    Attributes:
        start: The first element.
        stop: The one after the last.
        whole: Whether they are whole groups.
    """

    start: int
    stop: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines along an axis.

    Attributes:
        length: The elements of a line.
        inner: How far two of a line's elements are apart; so many lines interleave.
        number: How many lines there are.
    """

    length: int
    inner: int
    number: int

    @classmethod
    def along(cls, shape: Sequence[int], size: int, axis: int) -> Lines:
        """Those of a tensor; of one without a shape: it is one line."""
        shape = tuple(shape) if shape and math.prod(shape) == size else (size,)
        axis %= len(shape)
        return cls(shape[axis], math.prod(shape[axis + 1 :]), size // max(shape[axis], 1))

    @property
    def group(self) -> int:
        """The elements of a group."""
        return self.length * self.inner

    def cut_by(self, slice_elements: int, size: int) -> int:
        """The most elements of groups that slices of so many elements cut, or of multiples of that."""
        if slice_elements % self.group == 0:
            return 0
        return min(size, size // slice_elements * self.group)

    def numbers(self, first: int, count: int) -> Array:
        """The line that each element belongs to, int64, shape (count,)."""
        positions = np.arange(first, first + count)
        if self.inner == 1:
            return np.asarray(positions // self.length)
        return np.asarray(positions // self.group * self.inner + positions % self.inner)

    def parts(self, first: int, count: int) -> Iterator[GroupRun]:
        """Consecutive elements cut where groups begin: the end of one, whole ones, the beginning of one."""
        stop = first + count
        begin, end = -(-first // self.group) * self.group, stop // self.group * self.group
        if begin > end:  # They lie within one.
            yield GroupRun(first, stop, False)
            return
        edges = [(first, begin, False), (begin, end, True), (end, stop, False)]
        yield from (GroupRun(*edge) for edge in edges if edge[0] < edge[1])


def mean_ranks(values: Array) -> Array:
    """The ranks along axis 1 of an array of three dimensions, from 0, the smallest; equal values share their mean rank.

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


#: A piece of a group that slices cut: its first element, and the models' magnitudes, shape (models, elements).
Fragment = tuple[int, Array]


class LineKeep:
    """The probability of keeping each element, by its magnitude's rank in its line.

    Of lines that slices cut it is known; that of others is found when all their elements are at hand.

    Args:
        lines: The lines.
        probabilities: Of ranks from 0 on and a line's length, one function a model.
        compute: The type of probabilities.
        fragments: All pieces of groups that slices cut.
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
        pieces: dict[int, list[Fragment]] = {}
        for fragment in fragments:
            pieces.setdefault(fragment[0] // lines.group, []).append(fragment)
        for group, own in pieces.items():
            own.sort(key=lambda each: each[0])
            self._cut[group] = self._keep(np.concatenate([magnitudes for _, magnitudes in own], axis=1))

    def of(self, first: int, magnitudes: Array) -> Array:
        """Those of consecutive elements of all models, shape (models, elements)."""
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
        """The same of whole groups, a few at a time."""
        keep = np.empty(magnitudes.shape, self._compute)
        length, step = self.lines.length, max(TOGETHER // self.lines.group, 1) * self.lines.group
        for own, values, probability in zip(keep, magnitudes, self._probabilities, strict=True):
            for start in range(0, values.size, step):
                ranks = mean_ranks(values[start : start + step].reshape(-1, length, self.lines.inner))
                own[start : start + step] = probability(ranks, length).ravel()
        return keep


class Accumulated(NamedTuple):
    """Sums along lines, and what their additions lost, of consecutive groups.

    Attributes:
        group: The first group.
        sums: float64, shape (rows, groups, inner).
        lost: The same shape.
    """

    group: int
    sums: Array
    lost: Array


def add_exactly(one: Array, other: Array) -> tuple[Array, Array]:
    """The sums, and what each of them lost: Knuth's two-sum (The Art of Computer Programming, 2, 4.2.2)."""
    added = one + other
    of_other = added - one
    return added, (one - (added - of_other)) + (other - of_other)


def accumulate(parts: Sequence[Accumulated]) -> Accumulated:
    """The sums of several parts, whose groups may be the same ones."""
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
    """The sums along all lines, float64, shape (rows, lines)."""
    whole = accumulate(parts)
    with np.errstate(all="ignore"):
        # What was lost beside an infinity is not a number.
        sums = np.where(np.isfinite(whole.sums), whole.sums + whole.lost, whole.sums)
    return np.asarray(sums.reshape(sums.shape[0], -1))
