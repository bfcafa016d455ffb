"""The methods as compiled loops over raw bytes.

Every kernel walks a slice in blocks that stay in the first-level cache: decode the models' bytes to
the compute type, subtract the base, sparsify, then measure or merge and encode. Nothing is allocated
and the GIL is released. One compilation serves all storage types, methods and numbers of models: what
differs is an integer, looked at once a block. Arithmetic follows the definitions in
:mod:`modelfuse.methods` operation by operation, so the bits are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.loading import compile_kernel
from modelfuse.methods.random import GAMMA, MIX_1, MIX_2, SCALE, SHIFT
from modelfuse.methods.ties import MIN_DIVISOR

#: Elements a block: few enough for the nearest caches, enough that calling a function for each costs nothing.
BLOCK = 2048
#: Elements a partial sum. Fixed, so that sums do not depend on slices.
CHUNK = 32768
LANES = 16

#: Storage codes.
RAW_F32, RAW_F64, RAW_BF16, RAW_F16 = 0, 1, 2, 3
#: Sparsifier codes.
NO_SPARSIFIER, TRIM, DARE, MAGPRUNE = 0, 1, 2, 3
#: Merge codes.
LINEAR, TIES_SUM, TIES_COUNT = 0, 1, 2

#: Magnitudes are tallied by 15 leading bits (sign dropped, exponent and first mantissa bits) and, in front of them, a
#: sticky bit: whether any of the bits that remain is set. Differences of bfloat16 models rarely have any, so nearly all
#: of their bins hold one value; and the bins they use lie side by side, so that they stay in the first-level cache.
LEAD_BITS = 15
LEADS = 1 << LEAD_BITS
BINS = 2 * LEADS
#: A threshold's bin is tallied again by so many bits at a time.
DIGIT_BITS = 16
#: Bins that hold too many ranks are tallied again by so many bits at a time: there may be thousands of them.
RANK_BITS = 6
RANKS = 1 << RANK_BITS
#: A float32 tally packs the count above the sum of the remaining 16 bits; a span stays below 2²³ elements.
COUNT_SHIFT = 40

Array = np.ndarray[Any, Any]


class Slice(NamedTuple):
    """The stored bytes of a run of elements.

    Attributes:
        raws: uint8, shape (sources, bytes): each source's elements from column 0 on, the base's in the last row.
        codes: int64, shape (sources,): the storage codes.
        models: The number of models, without the base.
        has_base: Whether there is one.
        deltas: bool, shape (models,): which models are differences to the base already.
        first: The number of the first element in the tensor.
        length: The number of elements.
    """

    raws: Array
    codes: Array
    models: int
    has_base: bool
    deltas: Array
    first: int
    length: int


class Room(NamedTuple):
    """A worker's scratch for one block.

    Attributes:
        x: Compute type, shape (sources, BLOCK): the decoded elements.
        rows: Compute type, shape (3, BLOCK): results on their way.
        draws: float32, shape (BLOCK,).
        bits: uint64, shape (BLOCK,): magnitudes, or the words that draws are made of.
        bins: uint16, shape (BLOCK,).
        bad: int64, shape (sources + 1,): counts of non-finite elements, the last one for the output.
    """

    x: Array
    rows: Array
    draws: Array
    bits: Array
    bins: Array
    bad: Array


class Sparsifier(NamedTuple):
    """What it takes to sparsify any element of a tensor.

    Attributes:
        kind: The sparsifier's code.
        rescale: Whether to divide what is kept by its probability.
        keys: uint64, shape (models,): the random streams.
        numbers: Compute type, shape (models, 2): threshold and factor of trim; probability, and whether there is
            anything to drop, of dare and magprune.
        shift: The bits of a magnitude below its leading ones.
        tables: Compute type, shape (models, BINS): magprune's probabilities of being kept; −(slot + 1) where a subtable
            says more.
        subtables: Compute type, shape (slots, RANKS): the same for bins that needed more bits.
    """

    kind: int
    rescale: bool
    keys: Array
    numbers: Array
    shift: int
    tables: Array
    subtables: Array


_GAMMA, _MIX_1, _MIX_2 = np.uint64(GAMMA), np.uint64(MIX_1), np.uint64(MIX_2)
_SHIFT, _SCALE = np.uint32(SHIFT), np.float32(SCALE)


@compile_kernel
def _from_bfloat16(half: Any) -> Any:
    return np.uint32(np.uint32(half) << 16).view(np.float32)


@compile_kernel
def _from_float16(half: Any) -> Any:
    """Placing the 15 bits as a float32 leaves the exponent 112 too small, subnormals included."""
    shifted = np.uint32((np.uint32(half) & 0x7FFF) << 13)
    value = np.float32(shifted.view(np.float32) * np.float32(2.0**112))
    finite = np.uint32(value.view(np.uint32))
    bits = np.uint32(shifted | 0x7F800000) if (half & 0x7C00) == 0x7C00 else finite
    return np.uint32(bits | (np.uint32(half) & 0x8000) << 16).view(np.float32)


@compile_kernel
def _to_odd(value: Any) -> Any:
    """The bits of float32 rounded to odd where inexact: then a second rounding to 16 bits is as good as one."""
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
    """Adding 0.5 aligns a subnormal's last bit with float32's, so the addition rounds it."""
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
    """Widen ``count`` stored elements from number ``start`` on; returns how many are not finite."""
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
    """Round ``count`` values into the storage type, to nearest even; returns how many are not finite."""
    bad, largest = 0, np.uint16(0)
    if code == RAW_BF16:
        halves = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            halves[i] = _to_bfloat16(_to_odd(values[i]))
            largest = max(largest, np.uint16(halves[i] & 0x7FFF))
        if largest >= 0x7F80:
            for i in range(count):
                bad += (halves[i] & 0x7F80) == 0x7F80
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
def _load(data: Slice, start: int, count: int, room: Room) -> None:
    """Decode a block of all models into the rows of ``room.x``; with a base in the last row, subtract it."""
    x = room.x
    for row in range(data.models + data.has_base):
        room.bad[row] += decode(data.codes[row], data.raws[row], start, count, x[row])
    if data.has_base:
        base = x[data.models]
        for model in range(data.models):
            if not data.deltas[model]:
                delta = x[model]
                for i in range(count):
                    delta[i] -= base[i]


@compile_kernel
def uniform(key: Any, first: int, count: int, words: Array, out: Array) -> None:
    """The draws of :func:`modelfuse.methods.random.draws`; ``first`` is even, ``words`` has room for a block."""
    for i in range((count + 1) // 2):
        z = key + np.uint64((first >> 1) + i + 1) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        words[i] = z ^ (z >> np.uint64(31))
    halves = words.view(np.uint32)
    for i in range(count):
        out[i] = np.float32(np.int32(halves[i] >> _SHIFT)) * _SCALE


@compile_kernel
def _magnitude_bits(x: Array, count: int, bits: Array) -> None:
    """The bits of |x[i]|, which sort as the magnitudes do."""
    if x.itemsize == 4:
        singles = x.view(np.uint32)
        for i in range(count):
            bits[i] = np.uint64(singles[i] & np.uint32(0x7FFFFFFF))
    else:
        doubles = x.view(np.uint64)
        for i in range(count):
            bits[i] = doubles[i] & np.uint64(0x7FFFFFFFFFFFFFFF)


@compile_kernel
def _find_bins(x: Array, count: int, shift: int, bits: Array, bins: Array) -> None:
    """The bin of each magnitude; for float64, its bits are left in ``bits``."""
    if x.itemsize == 4:
        singles = x.view(np.uint32)
        for i in range(count):
            magnitude = np.uint32(singles[i] & np.uint32(0x7FFFFFFF))
            sticky = np.uint32((magnitude & np.uint32(0xFFFF)) != 0)
            bins[i] = np.uint16(np.uint32(magnitude >> np.uint32(16)) | np.uint32(sticky << np.uint32(LEAD_BITS)))
    else:
        _magnitude_bits(x, count, bits)
        rest = np.uint64((1 << shift) - 1)
        for i in range(count):
            front = np.uint64((bits[i] & rest) != 0) << np.uint64(LEAD_BITS)
            bins[i] = np.uint16((bits[i] >> np.uint64(shift)) | front)


@compile_kernel
def _keep_probabilities(how: Sparsifier, model: int, count: int, room: Room, out: Array) -> None:
    """Look up each element's probability of being kept by its magnitude's bits."""
    x, table, bins = room.x[model], how.tables[model], room.bins
    _find_bins(x, count, how.shift, room.bits, bins)
    for i in range(count):
        out[i] = table[bins[i]]
    if how.subtables.shape[0] > 0:
        _magnitude_bits(x, count, room.bits)
        for i in range(count):
            level = how.shift
            while out[i] < 0:
                level = max(level - RANK_BITS, 0)
                digit = (room.bits[i] >> np.uint64(level)) & np.uint64(RANKS - 1)
                out[i] = how.subtables[np.int64(-out[i]) - 1, digit]


@compile_kernel
def _sparsify(how: Sparsifier, model: int, first: int, count: int, room: Room) -> None:
    """Sparsify a block of one model in place."""
    x, draws, keep = room.x[model], room.draws, room.rows[0]
    zero = x.dtype.type(0)
    if how.kind == TRIM:
        threshold, factor = how.numbers[model, 0], how.numbers[model, 1]
        for i in range(count):
            kept = x[i] if abs(x[i]) >= threshold else zero
            x[i] = kept * factor
    elif how.kind == DARE:
        p = how.numbers[model, 0]
        single = np.float32(p)
        uniform(how.keys[model], first, count, room.bits, draws)
        divisor = p if how.rescale else x.dtype.type(1)
        for i in range(count):
            kept = x[i] if draws[i] < single else zero
            x[i] = kept / divisor
    elif how.kind == MAGPRUNE and how.numbers[model, 1] != 0:
        uniform(how.keys[model], first, count, room.bits, draws)
        _keep_probabilities(how, model, count, room, keep)
        if how.rescale:
            for i in range(count):
                kept = x[i] if draws[i] < np.float32(keep[i]) else zero
                x[i] = kept / keep[i]
        else:
            for i in range(count):
                x[i] = x[i] if draws[i] < np.float32(keep[i]) else zero


@compile_kernel
def _linear(x: Array, models: int, count: int, weights: Array, result: Array) -> None:
    for i in range(count):
        result[i] = x[0, i] * weights[0]
    for model in range(1, models):
        weight = weights[model]
        for i in range(count):
            result[i] += x[model, i] * weight


@compile_kernel
def _ties(x: Array, models: int, count: int, weights: Array, by_count: bool, normalize: bool, rows: Array) -> None:
    """Elect and sum; the result is left in ``rows[0]``."""
    result, elected, divisor = rows[0], rows[1], rows[2]
    zero = weights[0] - weights[0]
    one = zero + 1
    for model in range(models):
        y, weight = x[model], weights[model]
        if by_count:
            for i in range(count):
                y[i] *= weight
                vote = one if y[i] > 0 else (-one if y[i] < 0 else zero)
                elected[i] = vote if model == 0 else elected[i] + vote
        elif model == 0:
            for i in range(count):
                y[i] *= weight
                elected[i] = y[i]
        else:
            for i in range(count):
                y[i] *= weight
                elected[i] += y[i]
    for model in range(models):
        y, weight = x[model], weights[model]
        if model == 0:
            for i in range(count):
                agrees = y[i] > 0 if elected[i] >= 0 else y[i] < 0
                result[i] = zero + (y[i] if agrees else zero)
                divisor[i] = weight if agrees else zero
        else:
            for i in range(count):
                agrees = y[i] > 0 if elected[i] >= 0 else y[i] < 0
                result[i] += y[i] if agrees else zero
                divisor[i] += weight if agrees else zero
    if normalize:
        smallest = np.float64(np.float32(MIN_DIVISOR)) if x.itemsize == 4 else MIN_DIVISOR
        for i in range(count):
            result[i] /= divisor[i] if abs(divisor[i]) >= smallest else one


@compile_kernel
def combine(
    data: Slice,
    room: Room,
    how: Sparsifier,
    merge: int,
    weights: Array,
    normalize: bool,
    out_code: int,
    out: Array,
) -> None:
    """Merge one slice into the start of ``out``."""
    for start in range(0, data.length, BLOCK):
        size = min(BLOCK, data.length - start)
        _load(data, start, size, room)
        for model in range(data.models):
            _sparsify(how, model, data.first + start, size, room)
        if merge == LINEAR:
            _linear(room.x, data.models, size, weights, room.rows[0])
        else:
            _ties(room.x, data.models, size, weights, merge == TIES_COUNT, normalize, room.rows)
        result = room.rows[0]
        if data.has_base:
            base = room.x[data.models]
            for i in range(size):
                result[i] += base[i]
        room.bad[-1] += encode(out_code, result, size, out, start)


@compile_kernel
def dot_products(data: Slice, room: Room, how: Sparsifier, lanes: Array, sums: Array) -> None:
    """x₁·x₁, x₂·x₂ and x₁·x₂ of two models in float64, a row of ``sums`` for every CHUNK elements.

    Sixteen running sums a product, folded in a fixed order: the same bits on any processor.
    """
    x = room.x
    for chunk in range(0, data.length, CHUNK):
        lanes[:] = 0.0
        for start in range(chunk, min(chunk + CHUNK, data.length), BLOCK):
            size = min(BLOCK, data.length - start)
            _load(data, start, size, room)
            for model in range(data.models):
                _sparsify(how, model, data.first + start, size, room)
            for row in range(2):
                for i in range(size, -(-size // LANES) * LANES):
                    x[row, i] = 0
            for i in range(0, size, LANES):
                for lane in range(LANES):
                    a, b = np.float64(x[0, i + lane]), np.float64(x[1, i + lane])
                    lanes[0, lane] += a * a
                    lanes[1, lane] += b * b
                    lanes[2, lane] += a * b
        for product in range(3):
            total = 0.0
            for lane in range(LANES):
                total += lanes[product, lane]
            sums[chunk // CHUNK, product] = total


@compile_kernel
def tally(data: Slice, room: Room, shift: int, sums: bool, tables: Array) -> None:
    """Tally all magnitudes by their leading bits and sticky bit.

    ``tables[model]`` has a word for every bin, or three. For float32 it packs the count and, with ``sums``, the sum of
    the remaining bits; for float64 they are the count, and the sums of the low 22 remaining bits and of the others.
    """
    bins = room.bins
    for start in range(0, data.length, BLOCK):
        size = min(BLOCK, data.length - start)
        _load(data, start, size, room)
        for model in range(data.models):
            table = tables[model]
            _find_bins(room.x[model], size, shift, room.bits, bins)
            if room.x.itemsize == 4:
                halves = room.x[model].view(np.uint16)
                if sums:
                    for i in range(size):
                        table[bins[i]] += np.uint64(1 << COUNT_SHIFT) + np.uint64(halves[2 * i])
                else:
                    for i in range(size):
                        table[bins[i]] += np.uint64(1 << COUNT_SHIFT)
            else:
                for i in range(size):
                    _count(room.bits[i], shift, table, bins[i])


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
    rest, place = bits & np.uint64((1 << shift) - 1), 3 * np.int64(row)
    table[place] += np.uint64(1)
    table[place + 1] += rest & np.uint64(0x3FFFFF)
    table[place + 2] += rest >> np.uint64(22)


@compile_kernel
def tally_within(
    data: Slice,
    room: Room,
    shifts: tuple[int, int, int],
    prefixes: Array,
    begins: Array,
    tables: Array,
) -> None:
    """Tally the next digits of the magnitudes that lie in chosen bins.

    ``shifts`` are the bits below the leading ones, below a prefix, and below a digit. ``prefixes`` ascend for each
    model; those of ``model`` with the leading bits ``lead`` are the numbers ``begins[model, lead]`` to
    ``begins[model, lead + 1]``. The row of ``tables`` with a prefix's number holds three words for every digit: a count
    and the sums of the low 22 remaining bits and of the others.
    """
    lead_shift, parent_shift, shift = np.uint64(shifts[0]), np.uint64(shifts[1]), np.uint64(shifts[2])
    mask = np.uint64(tables.shape[1] // 3 - 1)
    bits = room.bits
    for start in range(0, data.length, BLOCK):
        size = min(BLOCK, data.length - start)
        _load(data, start, size, room)
        for model in range(data.models):
            if begins[model, 0] == begins[model, LEADS]:
                continue
            _magnitude_bits(room.x[model], size, bits)
            for i in range(size):
                lead = bits[i] >> lead_shift
                begin, end = begins[model, lead], begins[model, lead + np.uint64(1)]
                if begin < end:
                    prefix = bits[i] >> parent_shift
                    row = _find(prefixes, begin, end, prefix)
                    if prefixes[row] == prefix:
                        _count(bits[i], shifts[2], tables[row], (bits[i] >> shift) & mask)


@compile_kernel
def _find(prefixes: Array, begin: int, end: int, prefix: Any) -> int:
    """The last place of ``begin`` to ``end`` that holds no more than ``prefix``, or ``begin``."""
    while end - begin > 1:
        middle = (begin + end) // 2
        if prefixes[middle] <= prefix:
            begin = middle
        else:
            end = middle
    return begin
