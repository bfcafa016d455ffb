"""Tally magnitudes by their leading bits, and by the digits after them, for exact order statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Bins(NamedTuple):
    """What is tallied.

    Attributes:
        within: Whether magnitudes in chosen bins are tallied by the next digit; else all are, by their leading bits.
        sums: Whether sums of remaining bits are needed; of chosen bins there are always some.
        shifts: The numbers of bits below the leading ones, below a prefix, and below a digit.
        prefixes: uint64, shape (bins,): leading bits of the chosen bins, ascending for each model.
        first: The leading bits of the smallest prefix.
        begins: int32, shape (models, leads + 2): the prefixes of ``model`` with the leading bits ``first + lead`` have
            the indices ``begins[model, lead]`` to ``begins[model, lead + 1]``; the last bin has none.
    """

    within: bool
    sums: bool
    shifts: tuple[int, int, int]
    prefixes: Array
    first: int
    begins: Array


@compile_kernel
def tally(data: Stored, length: int, buffers: BlockBuffers, bins: Bins, tables: Array) -> None:
    """Tally the magnitudes of all models' elements; see :func:`tally_block`."""
    count_only(buffers)
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        load(data, start, size, buffers, length)
        tally_block(buffers, data.inputs.models, size, bins, tables)


@compile_kernel
def count_only(buffers: BlockBuffers) -> None:
    """Set the amounts that are added to bins to counts, which they remain unless there are sums."""
    for row in range(TOGETHER):
        for i in range(BLOCK):
            buffers.amounts[row, i] = np.uint64(1 << COUNT_SHIFT)


@compile_kernel
def tally_block(buffers: BlockBuffers, models: int, size: int, bins: Bins, tables: Array) -> None:
    """Tally the magnitudes of the first models' elements in a block.

    All magnitudes are tallied by their leading bits and sticky bit: ``tables[model]`` has one word per bin for float32,
    the count and, with sums, the sum of the remaining bits, packed. For float64 it has three: the count, and the sums
    of the low 22 remaining bits and of the others. Magnitudes in chosen bins are tallied by the next digit: the row of
    ``tables`` at a prefix's index has these three words per digit.
    """
    if bins.within:
        _tally_within(buffers, models, size, bins, tables)
        return
    narrow, shift, model = buffers.x.itemsize == 4, bins.shifts[0], 0
    while model < models:
        # Two or three models at a time; four as two pairs.
        together = min(models - model, 2 if models - model == 4 else TOGETHER) if narrow else 1
        for row in range(together):
            find_bins(buffers, model + row, size, shift, row)
        if narrow:
            _add(buffers, model, together, size, bins.sums, tables)
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
def _tally_within(buffers: BlockBuffers, models: int, size: int, bins: Bins, tables: Array) -> None:
    lead_shift, parent_shift = np.uint64(bins.shifts[0]), np.uint64(bins.shifts[1])
    shift, mask = np.uint64(bins.shifts[2]), np.uint64(tables.shape[1] // 3 - 1)
    bits, begins, prefixes = buffers.bits, bins.begins, bins.prefixes
    leads = np.uint64(begins.shape[1] - 2)
    for model in range(models):
        if begins[model, 0] == begins[model, -1]:
            continue
        magnitude_bits(buffers, model, size)
        # First those in bins with a prefix, without a branch: there is no telling which they are.
        hits, chosen, found = buffers.bins[0], begins[model], 0
        for i in range(size):
            # Smaller ones wrap around to huge numbers. The last bin is empty.
            lead = min((bits[i] >> lead_shift) - np.uint64(bins.first), leads)
            hits[found] = i
            found += chosen[lead] < chosen[lead + np.uint64(1)]
        for hit in range(found):
            own = bits[hits[hit]]
            lead, prefix = (own >> lead_shift) - np.uint64(bins.first), own >> parent_shift
            row = _find(prefixes, chosen[lead], chosen[lead + np.uint64(1)], prefix)
            if prefixes[row] == prefix:
                _count(own, bins.shifts[2], tables[row], (own >> shift) & mask)


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
