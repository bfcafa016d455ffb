"""Building blocks of all compiled loops: decode stored bytes, draw random numbers, look up ranks, encode.

Each kernel processes a slice in blocks that stay in the L1 cache: decode the models' bytes to the compute type,
subtract the base, apply the element step, then measure, or combine and encode. Kernels allocate nothing and release
the GIL. One compilation serves all stored types and numbers of models: these are integers that are checked once per
block. The loops of the methods are generated (:mod:`modelfuse.kernels.compiled.generate`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.compiled.direct_reads import BLOCK, DirectReads, column_of
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.kernels.order_statistics import LEAD_BITS, RANK_BITS, RANKS
from modelfuse.methods.random import GAMMA, MIX_1, MIX_2, SCALE, SHIFT

#: Elements per partial sum. Fixed, so that sums do not depend on slices.
CHUNK = 32768
#: Models whose magnitudes are counted alternately.
TOGETHER = 3

#: Storage codes.
RAW_F32, RAW_F64, RAW_BF16, RAW_F16 = 0, 1, 2, 3

#: A float32 tally packs the count above the sum of the 16 remaining bits; spans have fewer than 2²³ elements.
COUNT_SHIFT = 40

Array = np.ndarray[Any, Any]


class SourceTypes(NamedTuple):
    """The stored types of a tensor's sources.

    Attributes:
        codes: int64, shape (sources,): storage codes, the base's last.
        models: The number of models, without the base.
        has_base: Whether there is a base.
        deltas: bool, shape (models,): which models are already differences to the base.
    """

    codes: Array
    models: int
    has_base: bool
    deltas: Array


class Stored(NamedTuple):
    """The stored bytes of a slice: inputs and output.

    Attributes:
        inputs: The types of the sources.
        raws: uint8, shape (sources, bytes): each source's elements from column 0 on, the base's in the last row.
        halves: uint16, shape (sources, bytes / 2): the same memory. Reinterpreting an array inside a kernel is slow, so
            memory that is used as two types is passed as two arrays.
        out: uint8, shape (bytes,): the buffer for the result.
        out_halves: uint16, shape (bytes / 2,): the same memory.
    """

    inputs: SourceTypes
    raws: Array
    halves: Array
    out: Array
    out_halves: Array


class BlockBuffers(NamedTuple):
    """A worker's buffers for one block.

    Attributes:
        x: Compute type, shape (sources, BLOCK): the decoded elements of the models, then those of the base.
        singles: uint32: the bits of ``x``, if the compute type is float32.
        doubles: uint64: the bits of ``x``, if the compute type is float64.
        rows: Compute type, shape (rows, BLOCK): intermediate results; the first row is the result.
        draws: float32, shape (BLOCK,).
        bits: uint64, shape (BLOCK,): bits of magnitudes, or random words.
        words: uint32, shape (2 · BLOCK,): the same memory as halves.
        bins: uint16, shape (TOGETHER, BLOCK): bins of magnitudes.
        amounts: uint64, shape (TOGETHER, BLOCK): the amounts that are added to the bins.
        bad: int64, shape (sources + 1,): counts of non-finite elements, the last one for the output.
        tables: Compute type, shape (models, BINS): magprune's probabilities of being kept, by bin; bins without a
            magnitude of this tensor have stale values. No rows for other sparsifiers.
        marks: uint8, shape (models, elements of a slice): 1 for elements that are kept by their rank within a line. No
            rows for other sparsifiers.
        files: The files that the kernel reads the elements from.
    """

    x: Array
    singles: Array
    doubles: Array
    rows: Array
    draws: Array
    bits: Array
    words: Array
    bins: Array
    amounts: Array
    bad: Array
    tables: Array
    marks: Array
    files: DirectReads


class LaidOutElement(NamedTuple):
    """The parameters of the element step, laid out.

    Attributes:
        keys: uint64, shape (models,): keys of the random streams.
        numbers: Compute type, shape (models, numbers): in the order of the chain's ``element_numbers``.
        shift: The number of bits of a magnitude below its leading ones.
        bins: uint16, shape (bins,): the non-empty bins of all models, concatenated, if ranks are measured.
        ends: int64, shape (models,): the end of each model's bins in ``bins``.
        keeps: Compute type, shape (bins,): their probabilities of being kept; −(slot + 1) refers to a subtable.
        subtables: Compute type, shape (slots, RANKS): probabilities by the next digit, for bins that needed more bits.
        exact: Compute type, shape (models, elements): each element's probability, for a small tensor; else no rows.
    """

    keys: Array
    numbers: Array
    shift: int
    bins: Array
    ends: Array
    keeps: Array
    subtables: Array
    exact: Array


class LinedNumbers(NamedTuple):
    """Numbers that each line of the tensor has its own of.

    Attributes:
        length: Elements per line.
        inner: The stride of a line, which is also the number of interleaving lines.
        table: Compute type, shape (numbers · models, lines).
    """

    length: int
    inner: int
    table: Array


class Numbers(NamedTuple):
    """The parameters of expressions of all models' elements, laid out.

    Attributes:
        each: Compute type, shape (models, numbers): those that each model has its own of.
        shared: Compute type, shape (numbers,): those that all models share.
        factor: Compute type, shape (1,): multiplies the result before the base is added.
        scales: Whether the factor is not 1.
        lined: Those that each line has its own of.
    """

    each: Array
    shared: Array
    factor: Array
    scales: bool
    lined: LinedNumbers


_GAMMA, _MIX_1, _MIX_2 = np.uint64(GAMMA), np.uint64(MIX_1), np.uint64(MIX_2)
_SHIFT, _SCALE = np.uint32(SHIFT), np.float32(SCALE)


@compile_kernel
def choose(condition: Any, one: Any, other: Any) -> Any:
    """``one`` where true, else ``other``: a selection without a branch, as both are evaluated."""
    return one if condition else other


@compile_kernel
def width_of(code: int) -> int:
    """Bytes per stored element."""
    return 4 if code == RAW_F32 else (8 if code == RAW_F64 else 2)


@compile_kernel
def _from_bfloat16(half: Any) -> Any:
    return np.uint32(np.uint32(half) << 16).view(np.float32)


@compile_kernel
def _from_float16(half: Any) -> Any:
    """The low 15 bits shifted into a float32 have an exponent that is 112 too small, also for subnormals."""
    shifted = np.uint32((np.uint32(half) & 0x7FFF) << 13)
    value = np.float32(shifted.view(np.float32) * np.float32(2.0**112))
    finite = np.uint32(value.view(np.uint32))
    bits = np.uint32(shifted | 0x7F800000) if (half & 0x7C00) == 0x7C00 else finite
    return np.uint32(bits | (np.uint32(half) & 0x8000) << 16).view(np.float32)


@compile_kernel
def _to_odd(value: Any) -> Any:
    """The bits as float32, rounded to odd where inexact: a second rounding to 16 bits is then as good as one."""
    single = np.float32(value)
    back = np.float64(single)
    bits = np.uint32(single.view(np.uint32))
    odd = np.uint32((bits - np.uint32(abs(back) > abs(value))) | 1)
    return odd if back != value and value == value else bits


@compile_kernel
def _to_bfloat16(bits: Any) -> Any:
    rounded = np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = np.uint32(bits >> 16) | 0x40
    return np.uint16(quiet if np.uint32(bits & 0x7FFFFFFF) > 0x7F800000 else rounded)


@compile_kernel
def _to_float16(bits: Any) -> Any:
    """Adding 0.5 aligns the last bit of a float16 subnormal with that of float32, so that the addition rounds it."""
    size = np.uint32(bits & 0x7FFFFFFF)
    tiny = np.float32(size.view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(np.uint32(tiny.view(np.uint32)) - 0x3F000000)
    normal = np.uint32(np.uint32(size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13)
    half = subnormal if size < 0x38800000 else normal
    special = np.uint32(0x7E00) if size > 0x7F800000 else np.uint32(0x7C00)
    half = special if size >= 0x47800000 else half
    return np.uint16(half | ((bits >> 16) & 0x8000))


@compile_kernel
def decode(code: int, raw: Array, start: int, count: int, out: Array) -> int:
    """Decode ``count`` stored elements from index ``start`` on; returns how many are not finite."""
    largest, infinite = np.uint16(0), np.uint16(0x7F80 if code == RAW_BF16 else 0x7C00)
    if code == RAW_BF16:
        halves = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            out[i] = _from_bfloat16(halves[i])
            largest = max(largest, np.uint16(halves[i] & 0x7FFF))
    elif code == RAW_F16:
        halves = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            out[i] = _from_float16(halves[i])
            largest = max(largest, np.uint16(halves[i] & 0x7FFF))
    elif code == RAW_F32:
        singles = raw.view(np.float32)[start : start + count]
        for i in range(count):
            out[i] = singles[i]
        return _count_bad(out, count)
    else:
        doubles = raw.view(np.float64)[start : start + count]
        for i in range(count):
            out[i] = doubles[i]
        return _count_bad(out, count)
    return _count_bad(out, count) if largest >= infinite else 0


@compile_kernel
def _count_bad(values: Array, count: int) -> int:
    bad = 0
    for i in range(count):
        zero = values[i] - values[i]
        bad += zero != zero
    return bad


@compile_kernel
def encode(code: int, values: Array, count: int, raw: Array, start: int) -> int:
    """Round ``count`` values to the stored type, ties to even; returns how many are not finite."""
    bad, largest = 0, np.uint16(0)
    if code == RAW_BF16:
        bad = _narrow(values, count, raw.view(np.uint16), start)
    elif code == RAW_F16:
        halves = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            halves[i] = _to_float16(_to_odd(values[i]))
            largest = max(largest, np.uint16(halves[i] & 0x7FFF))
        if largest >= 0x7C00:
            for i in range(count):
                bad += (halves[i] & 0x7C00) == 0x7C00
    elif code == RAW_F32:
        singles = raw.view(np.float32)[start : start + count]
        for i in range(count):
            singles[i] = np.float32(values[i])
        bad = _count_bad(singles, count)
    else:
        doubles = raw.view(np.float64)[start : start + count]
        for i in range(count):
            doubles[i] = values[i]
        bad = _count_bad(values, count)
    return bad


@compile_kernel
def _narrow(values: Array, count: int, halves: Array, start: int) -> int:
    """Round to bfloat16; returns how many are not finite."""
    largest, out = np.uint16(0), halves[start : start + count]
    for i in range(count):
        half = _to_bfloat16(_to_odd(values[i]))
        out[i] = half
        largest = max(largest, np.uint16(half & np.uint16(0x7FFF)))
    return _count_bad_halves(out, count) if largest >= 0x7F80 else 0


@compile_kernel
def _widen(halves: Array, count: int, out: Array) -> int:
    """Decode bfloat16; returns how many are not finite."""
    largest = np.uint16(0)
    for i in range(count):
        out[i] = _from_bfloat16(halves[i])
        largest = max(largest, np.uint16(halves[i] & np.uint16(0x7FFF)))
    return _count_bad_halves(halves, count) if largest >= 0x7F80 else 0


@compile_kernel
def _widen_less(halves: Array, base: Array, count: int, out: Array) -> int:
    """Decode bfloat16 and subtract the base; returns how many are not finite."""
    largest = np.uint16(0)
    for i in range(count):
        out[i] = _from_bfloat16(halves[i]) - base[i]
        largest = max(largest, np.uint16(halves[i] & np.uint16(0x7FFF)))
    return _count_bad_halves(halves, count) if largest >= 0x7F80 else 0


@compile_kernel
def _count_bad_halves(halves: Array, count: int) -> int:
    bad = 0
    for i in range(count):
        bad += (halves[i] & np.uint16(0x7F80)) == 0x7F80
    return bad


@compile_kernel
def load(data: Stored, begin: int, count: int, buffers: BlockBuffers, length: int) -> None:
    """Decode a block of a slice of ``length`` elements into the rows of ``buffers.x``, and subtract the base."""
    load_from(data, column_of(buffers.files, data.raws, begin, length), count, buffers)


@compile_kernel
def load_from(data: Stored, start: int, count: int, buffers: BlockBuffers) -> None:
    """The same for elements that were read, from column ``start`` on."""
    x, last, inputs = buffers.x, buffers.x.shape[0] - 1, data.inputs
    base = x[last]
    for row in range(inputs.models + inputs.has_base - 1, -1, -1):
        less = inputs.has_base and row < inputs.models and not inputs.deltas[row]
        out = x[row] if row < inputs.models else base
        if inputs.codes[row] == RAW_BF16:
            halves = data.halves[row, start : start + count]
            bad = _widen_less(halves, base, count, out) if less else _widen(halves, count, out)
        else:
            bad = decode(inputs.codes[row], data.raws[row], start, count, out)
            if less:
                for i in range(count):
                    out[i] -= base[i]
        buffers.bad[row] += bad


@compile_kernel
def draw_of(half: Any) -> Any:
    """The draw in [0, 1) of 32 random bits."""
    return np.float32(np.int32(half >> _SHIFT)) * _SCALE


@compile_kernel
def uniform(key: Any, first: int, count: int, words: Array, halves: Array, out: Array) -> None:
    """The draws of :func:`modelfuse.methods.random.draws`; ``first`` is even, ``words`` has one word for two draws.

    ``halves`` is the memory of ``words`` as uint32.
    """
    random_words(key, first, count, words)
    for i in range(count):
        out[i] = draw_of(halves[i])


@compile_kernel
def random_words(key: Any, first: int, count: int, words: Array) -> None:
    """The random bits of ``count`` draws, two in a word; ``first`` is even."""
    for i in range((count + 1) // 2):
        z = key + np.uint64((first >> 1) + i + 1) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        words[i] = z ^ (z >> np.uint64(31))


@compile_kernel
def magnitude_bits(buffers: BlockBuffers, model: int, count: int) -> None:
    """Store the bits of a model's |x[i]|, which sort like the magnitudes, in ``buffers.bits``."""
    bits = buffers.bits
    if buffers.x.itemsize == 4:
        singles = buffers.singles[model]
        for i in range(count):
            bits[i] = np.uint64(singles[i] & np.uint32(0x7FFFFFFF))
    else:
        doubles = buffers.doubles[model]
        for i in range(count):
            bits[i] = doubles[i] & np.uint64(0x7FFFFFFFFFFFFFFF)


@compile_kernel
def gather(data: Stored, length: int, buffers: BlockBuffers, out: Array) -> None:
    """Store the bits of all models' magnitudes in ``out``: uint64, shape (models, length)."""
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        load(data, start, size, buffers, length)
        for model in range(data.inputs.models):
            magnitude_bits(buffers, model, size)
            for i in range(size):
                out[model, start + i] = buffers.bits[i]


@compile_kernel
def find_bins(buffers: BlockBuffers, model: int, count: int, shift: int, row: int) -> None:
    """Store the bin of each magnitude in a row of ``buffers.bins``; for float64, also its bits in ``buffers.bits``."""
    bins, bits = buffers.bins[row], buffers.bits
    if buffers.x.itemsize == 4:
        singles = buffers.singles[model]
        for i in range(count):
            magnitude = np.uint32(singles[i] & np.uint32(0x7FFFFFFF))
            sticky = np.uint32((magnitude & np.uint32(0xFFFF)) != 0)
            bins[i] = np.uint16(np.uint32(magnitude >> np.uint32(16)) | np.uint32(sticky << np.uint32(LEAD_BITS)))
    else:
        magnitude_bits(buffers, model, count)
        rest = np.uint64((1 << shift) - 1)
        for i in range(count):
            front = np.uint64((bits[i] & rest) != 0) << np.uint64(LEAD_BITS)
            bins[i] = np.uint16((bits[i] >> np.uint64(shift)) | front)


@compile_kernel
def spread(how: LaidOutElement, buffers: BlockBuffers) -> None:
    """Copy magprune's probabilities into the lookup tables."""
    begin = 0
    for model in range(how.ends.size):
        for i in range(begin, how.ends[model]):
            buffers.tables[model, how.bins[i]] = how.keeps[i]
        begin = how.ends[model]


@compile_kernel
def keep_probabilities(
    how: LaidOutElement, model: int, first: int, count: int, buffers: BlockBuffers, out: Array
) -> None:
    """Look up each element's probability of being kept by its magnitude's bits."""
    if how.exact.shape[0] > 0:
        exact = how.exact[model]
        for i in range(count):
            out[i] = exact[first + i]
        return
    table, bins = buffers.tables[model], buffers.bins[0]
    find_bins(buffers, model, count, how.shift, 0)
    for i in range(count):
        out[i] = table[bins[i]]
    if how.subtables.shape[0] > 0:
        magnitude_bits(buffers, model, count)
        for i in range(count):
            level = how.shift
            while out[i] < 0:
                level = max(level - RANK_BITS, 0)
                digit = (buffers.bits[i] >> np.uint64(level)) & np.uint64(RANKS - 1)
                out[i] = how.subtables[np.int64(-out[i]) - 1, digit]


@compile_kernel
def keep_marked(model: int, first: int, count: int, buffers: BlockBuffers, out: Array) -> None:
    """Probabilities that every draw compares with as marked: 1 for elements that are kept, else 0."""
    marks, start = buffers.marks[model], first - buffers.files.slice[0]
    for i in range(count):
        out[i] = marks[start + i]


@compile_kernel
def expand(lined: LinedNumbers, first: int, count: int, out: Array) -> None:
    """Store the numbers of each element's line in rows: compute type, shape (numbers · models, BLOCK)."""
    table, length, inner, start = lined.table, lined.length, lined.inner, 0
    while start < count:
        group, place = (first + start) // (length * inner), (first + start) % (length * inner)
        line = group * inner + place % inner
        if inner == 1:
            size = min(length - place, count - start)
            for row in range(table.shape[0]):
                value = table[row, line]
                for i in range(start, start + size):
                    out[row, i] = value
        else:
            size = min(inner - place % inner, count - start)
            for row in range(table.shape[0]):
                for i in range(size):
                    out[row, start + i] = table[row, line + i]
        start += size


@compile_kernel
def finish(data: Stored, buffers: BlockBuffers, numbers: Numbers, count: int, out_code: int, start: int) -> None:
    """Scale a block's result, add the base, and encode it into the output from element ``start`` on."""
    result = buffers.rows[0]
    if numbers.scales:
        factor = numbers.factor[0]
        for i in range(count):
            result[i] *= factor
    if data.inputs.has_base:
        base = buffers.x[buffers.x.shape[0] - 1]
        for i in range(count):
            result[i] += base[i]
    if out_code == RAW_BF16:
        buffers.bad[-1] += _narrow(result, count, data.out_halves, start)
    else:
        buffers.bad[-1] += encode(out_code, result, count, data.out, start)
