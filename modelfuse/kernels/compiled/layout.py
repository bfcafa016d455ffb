"""Parameters of passes as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from modelfuse.kernels import Work
from modelfuse.kernels.compiled import merge_loops
from modelfuse.kernels.compiled.combination import Combination
from modelfuse.kernels.element import Element, KeepTables
from modelfuse.kernels.jit.code_cache import prepare
from modelfuse.kernels.order_statistics import FLOAT_ENCODINGS, LEAD_BITS, RANKS
from modelfuse.kernels.procedures import Coefficients


def laid_out_element(work: Work, element: Element, names: Sequence[str]) -> Any:
    """The element step's :class:`~modelfuse.kernels.compiled.merge_loops.LaidOutElement`, with these numbers."""
    keys, numbers = np.array(element.keys, np.uint64), element.table(names, work.compute)
    keep = _laid_out_keep(element.keep, work.compute) if work.method.chain.looks_up else _no_keep(work.compute)
    return prepare(merge_loops.LaidOutElement(keys, numbers, *keep))


def _laid_out_keep(keep: KeepTables, compute: str) -> list[Any]:
    """The fields that depend on ranks."""
    tables = keep.tables or [(np.empty(0, np.uint64), np.empty(0))]
    bins = np.concatenate([bins for bins, _ in tables])
    exact = np.empty((0, 1)) if keep.exact is None else keep.exact
    return [
        FLOAT_ENCODINGS[compute].shift,
        ((bins >> np.uint64(1)) | (bins & np.uint64(1)) << np.uint64(LEAD_BITS)).astype(np.uint16),
        np.cumsum([bins.size for bins, _ in tables]),
        np.concatenate([keeps for _, keeps in tables]).astype(compute),
        keep.subtables.astype(compute),
        exact.astype(compute),
    ]


@cache
def _no_keep(compute: str) -> list[Any]:
    """The same fields, empty, for methods without ranks; laid out once."""
    return [prepare(each) for each in _laid_out_keep(KeepTables([], np.ones((0, RANKS)), 0), compute)]


def laid_out_numbers(work: Work, numbers: Coefficients, combination: Combination) -> Any:
    """The :class:`~modelfuse.kernels.compiled.merge_loops.Numbers` of expressions of all models' elements."""
    compute = work.compute
    each, shared = numbers.table(combination.each, compute), numbers.row(combination.shared, compute)
    lined = _laid_out_lines(work, numbers, combination.lined) if combination.lined else _no_lines(compute)
    factor = np.array([numbers.factor], compute)
    return prepare(merge_loops.Numbers(each, shared, factor, numbers.factor != 1.0, lined))


def _laid_out_lines(work: Work, numbers: Coefficients, names: Sequence[str]) -> Any:
    (lines,) = {numbers.lined[name][0] for name in names}
    tables = [np.broadcast_to(numbers.lined[name][1], (work.models, lines.number)) for name in names]
    return merge_loops.LinedNumbers(lines.length, lines.inner, np.concatenate(tables).astype(work.compute))


@cache
def _no_lines(compute: str) -> Any:
    return prepare(merge_loops.LinedNumbers(1, 1, np.empty((0, 1), compute)))
