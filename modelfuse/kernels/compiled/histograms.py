"""Magnitudes counted by their leading bits, and by those that follow: what exact order statistics are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.compiled.direct_reads import BLOCK
from modelfuse.kernels.compiled.merge_loops import (
    COUNT_SHIFT,
    TOGETHER,
    BlockBuffers,
    Stored,
    find_bins,
    load,
    magnitude_bits,
)
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.kernels.order_statistics import BINS, LEAD_BITS, LEADS

Array = np.ndarray[Any, Any]


@compile_kernel
def tally(data: Stored, length: int, buffers: BlockBuffers, shift: int, sums: bool, tables: Array) -> None:
    """Tally all magnitudes by their leading bits and sticky bit.

    ``tables[model]`` has a word for every bin, or three. For float32 it packs the count and, with ``sums``, the sum of
    the remaining bits; for float64 they are the count, and the sums of the low 22 remaining bits and of the others.
    """
    models, narrow = data.inputs.models, buffers.x.itemsize == 4
    for row in range(TOGETHER):  # Counts alone, unless there are sums.
        for i in range(BLOCK):
            buffers.amounts[row, i] = np.uint64(1 << COUNT_SHIFT)
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        load(data, start, size, buffers, length)
        model = 0
        while model < models:
            # Two or three models, four as two pairs.
            together = min(models - model, 2 if models - model == 4 else TOGETHER) if narrow else 1
            for row in range(together):
                find_bins(buffers, model + row, size, shift, row)
            if narrow:
                _add(buffers, model, together, size, sums, tables)
            else:
                for i in range(size):
                    _count(buffers.bits[i], shift, tables[model], buffers.bins[0, i])
            model += together


@compile_kernel
def _add(buffers: BlockBuffers, model: int, together: int, size: int, sums: bool, tables: Array) -> None:
    """Count magnitudes of some models in their bins, in turn; with ``sums``, add the bits that remain.

    Magnitudes repeat, zeros above all, and adding to a word that was just added to waits for that: what comes between
    are the other models' tables.
    """
    bins, amounts = buffers.bins, buffers.amounts
    for row in range(together if sums else 0):
        singles, own = buffers.singles[model + row], amounts[row]
        for i in range(size):
            own[i] = np.uint64(1 << COUNT_SHIFT) | np.uint64(singles[i] & np.uint32(0xFFFF))
    one, two, three = tables[model], tables[model + (together > 1)], tables[model + together - 1]
    for i in range(size):
        one[bins[0, i]] += amounts[0, i]
        if together > 1:
            two[bins[1, i]] += amounts[1, i]
        if together > 2:
            three[bins[2, i]] += amounts[2, i]


@compile_kernel
def collect(table: Array, numbers: Array, rows: Array) -> int:
    """Gather the bins of a model's tally that hold any magnitude, ascending, and clear them; returns how many.

    ``numbers`` takes the leading bits followed by the sticky bit; ``rows`` the count, and the sums of the low 22
    remaining bits and of the others.
    """
    found, columns = 0, table.size // BINS
    for lead in range(LEADS):
        if table[lead * columns] | table[(lead | LEADS) * columns] != 0:
            for sticky in range(2):
                row = (lead | (sticky << LEAD_BITS)) * columns
                if table[row] != 0:
                    numbers[found] = 2 * lead + sticky
                    if columns == 1:
                        rows[found, 0] = table[row] >> np.uint64(COUNT_SHIFT)
                        rows[found, 1] = table[row] & np.uint64((1 << COUNT_SHIFT) - 1)
                        rows[found, 2] = 0
                    else:
                        for column in range(3):
                            rows[found, column] = table[row + column]
                    for column in range(columns):
                        table[row + column] = 0
                    found += 1
    return found


@compile_kernel
def _count(bits: Any, shift: int, table: Array, row: Any) -> None:
    rest, at = bits & np.uint64((1 << shift) - 1), 3 * np.int64(row)
    table[at] += np.uint64(1)
    table[at + 1] += rest & np.uint64(0x3FFFFF)
    table[at + 2] += rest >> np.uint64(22)


@compile_kernel
def tally_within(
    data: Stored,
    length: int,
    buffers: BlockBuffers,
    shifts: tuple[int, int, int],
    prefixes: Array,
    first: int,
    begins: Array,
    tables: Array,
) -> None:
    """Tally the next digits of the magnitudes that lie in chosen bins.

    ``shifts`` are the bits below the leading ones, below a prefix, and below a digit. ``prefixes`` ascend for each
    model; those of ``model`` with the leading bits ``first + lead`` are the numbers ``begins[model, lead]`` to
    ``begins[model, lead + 1]``, and there are no others. The row of ``tables`` with a prefix's number holds three
    words for every digit: a count and the sums of the low 22 remaining bits and of the others.
    """
    lead_shift, parent_shift, shift = np.uint64(shifts[0]), np.uint64(shifts[1]), np.uint64(shifts[2])
    mask = np.uint64(tables.shape[1] // 3 - 1)
    bits, leads = buffers.bits, np.uint64(begins.shape[1] - 1)
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        load(data, start, size, buffers, length)
        for model in range(data.inputs.models):
            if begins[model, 0] == begins[model, -1]:
                continue
            magnitude_bits(buffers, model, size)
            for i in range(size):
                lead = (bits[i] >> lead_shift) - np.uint64(first)  # Far too large if it is below.
                if lead >= leads:
                    continue
                begin, end = begins[model, lead], begins[model, lead + np.uint64(1)]
                if begin < end:
                    prefix = bits[i] >> parent_shift
                    row = _find(prefixes, begin, end, prefix)
                    if prefixes[row] == prefix:
                        _count(bits[i], shifts[2], tables[row], (bits[i] >> shift) & mask)


@compile_kernel
def _find(prefixes: Array, begin: int, end: int, prefix: Any) -> int:
    """The last index of ``begin`` to ``end`` that holds no more than ``prefix``, or ``begin``."""
    while end - begin > 1:
        middle = (begin + end) // 2
        if prefixes[middle] <= prefix:
            begin = middle
        else:
            end = middle
    return begin
