"""Mark which elements of a slice are kept by their magnitudes' ranks within lines, before its other loops run."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.compiled.direct_reads import BLOCK, fill
from modelfuse.kernels.compiled.line_ranks import LaidOutLines, LineBuffers, mark_line
from modelfuse.kernels.compiled.merge_loops import BlockBuffers, Stored, draw_of, load_from, random_words
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.kernels.line_marks import WINDOW

Array = np.ndarray[Any, Any]


@compile_kernel
def mark_lines(
    data: Stored, first: int, length: int, buffers: BlockBuffers, lines: LaidOutLines, own: LineBuffers
) -> None:
    """Store whether each element of a slice is kept in ``buffers.marks``, and read the slice, if kernels read."""
    group, begin, stop = lines.length * lines.inner, first, first + length
    several = max(WINDOW // group, 1) * group
    while begin < stop:
        if begin % group == 0 and begin + group <= stop:
            end = begin + min(several, (stop - begin) // group * group)
            _read(data, first, begin, end, buffers)
            _mark_whole(data, first, begin, end, buffers, lines, own)
        else:
            end = min((begin // group + 1) * group, stop)
            _read(data, first, begin, end, buffers)
            _mark_cut(data, first, begin, end, buffers, lines)
        begin = end


@compile_kernel
def _read(data: Stored, first: int, begin: int, end: int, buffers: BlockBuffers) -> None:
    """Read elements of all sources to their place in the slice, if kernels read."""
    files = buffers.files
    if files.slice[1] > 0:
        for row in range(files.offsets.size):
            fill(files, data.raws, row, begin - first, end - begin, begin - first)


@compile_kernel
def _mark_cut(data: Stored, first: int, begin: int, end: int, buffers: BlockBuffers, lines: LaidOutLines) -> None:
    """The elements of a group that the slice cuts."""
    group = lines.length * lines.inner
    place = begin % group
    while lines.cut[place // group] < begin // group:
        place += group
    for model in range(data.inputs.models):
        marks, keeps = buffers.marks[model], lines.cut_keeps[model]
        for start in range(begin, end, BLOCK):
            size, odd = min(BLOCK, end - start), start & 1
            random_words(lines.streams[model], start - odd, size + odd, buffers.bits)
            for i in range(size):
                marks[start - first + i] = draw_of(buffers.words[odd + i]) < keeps[place + start - begin + i]


@compile_kernel
def _mark_whole(
    data: Stored, first: int, begin: int, end: int, buffers: BlockBuffers, lines: LaidOutLines, own: LineBuffers
) -> None:
    """The elements of whole groups."""
    _find_keys(data, begin - first, end - begin, buffers, own)
    size, group, odd = end - begin, lines.length * lines.inner, begin & 1
    for model in range(data.inputs.models):
        random_words(lines.streams[model], begin - odd, size + odd, own.random)
        draws, marks = own.draws[odd : odd + size], buffers.marks[model]
        for start in range(0, size, group):
            for inner in range(lines.inner):
                place = start + inner
                if lines.inner == 1:
                    keys = own.keys[model, place : place + lines.length]
                    bits = draws[place : place + lines.length]
                else:
                    keys, bits = own.line, own.line_draws
                    for i in range(lines.length):
                        keys[i] = own.keys[model, place + i * lines.inner]
                        bits[i] = draws[place + i * lines.inner]
                mark_line(keys, bits, model, lines, own)
                place += begin - first
                if lines.inner == 1:
                    for i in range(lines.length):
                        marks[place + i] = own.states[i] & 1
                else:
                    for i in range(lines.length):
                        marks[place + i * lines.inner] = own.states[i] & 1


@compile_kernel
def _find_keys(data: Stored, start: int, count: int, buffers: BlockBuffers, own: LineBuffers) -> None:
    """Store the bits of all models' magnitudes; ``start`` is the index of the first element in the slice."""
    for row in range(own.bad.size):
        own.bad[row] = buffers.bad[row]
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        load_from(data, start + begin, size, buffers)
        for model in range(data.inputs.models):
            keys = own.keys[model, begin : begin + size]
            if keys.itemsize == 4:
                singles = buffers.singles[model]
                for i in range(size):
                    keys[i] = singles[i] & np.uint32(0x7FFFFFFF)
            else:
                doubles = buffers.doubles[model]
                for i in range(size):
                    keys[i] = doubles[i] & np.uint64(0x7FFFFFFFFFFFFFFF)
    for row in range(own.bad.size):
        buffers.bad[row] = own.bad[row]
