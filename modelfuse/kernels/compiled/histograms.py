"""Tally magnitudes by their leading bits, and by the digits after them, for exact order statistics."""

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

    ``tables[model]`` has one word per bin for float32: the count and, with ``sums``, the sum of the remaining bits,
    packed. For float64 it has three: the count, and the sums of the low 22 remaining bits and of the others.
    """
    models, narrow = data.inputs.models, buffers.x.itemsize == 4
    for row in range(TOGETHER):  # Only counts, unless there are sums.
        for i in range(BLOCK):
            buffers.amounts[row, i] = np.uint64(1 << COUNT_SHIFT)
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        load(data, start, size, buffers, length)
        model = 0
        while model < models:
            # Two or three models at a time; four as two pairs.
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
    """Count magnitudes of several models, alternating between them; with ``sums``, add the remaining bits.

    Magnitudes repeat (zeros above all), and an increment waits for the previous one of the same word: alternating
    between the models' tables hides that latency.
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
    """Gather the non-empty bins of a model's tally, ascending, and clear them; returns their number.

    ``numbers`` receives the leading bits followed by the sticky bit; ``rows`` the count, and the sums of the low 22
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
    """Tally the next digit of the magnitudes in chosen bins.

    ``shifts`` are the numbers of bits below the leading ones, below a prefix, and below a digit. ``prefixes`` ascend
    for each model; those of ``model`` with the leading bits ``first + lead`` have the indices ``begins[model, lead]``
    to ``begins[model, lead + 1]``. The row of ``tables`` at a prefix's index has three words per digit: a count and
    the sums of the low 22 remaining bits and of the others.
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
                lead = (bits[i] >> lead_shift) - np.uint64(first)  # Wraps around to a huge number if it is smaller.
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
    """The last index from ``begin`` to ``end`` whose value is at most ``prefix``, or ``begin``."""
    while end - begin > 1:
        middle = (begin + end) // 2
        if prefixes[middle] <= prefix:
            begin = middle
        else:
            end = middle
    return begin
