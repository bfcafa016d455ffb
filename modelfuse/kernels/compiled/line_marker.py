"""Lay out the ranks within lines, and mark what is kept of a slice before its other loops run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelfuse.kernels import Work
from modelfuse.kernels.compiled.line_marks import mark_lines
from modelfuse.kernels.compiled.line_ranks import LaidOutLines
from modelfuse.kernels.compiled.scratch import Scratch
from modelfuse.kernels.jit.code_cache import prepare
from modelfuse.kernels.line_marks import known_bytes
from modelfuse.kernels.lines import LineKeep
from modelfuse.kernels.order_statistics import FLOAT_ENCODINGS

Array = np.ndarray[Any, Any]

#: The largest number of mantissa bits that bins are made of, by compute type: bins have 16 bits.
MANTISSA_BITS = {"float32": 7, "float64": 4}


class LineMarker:
    """Marks what is kept of the slices of a tensor.

    Args:
        work: The tensor.
        streams: The keys of the random streams, one per model.
        keep: The probabilities.
    """

    def __init__(self, work: Work, streams: Sequence[int], keep: LineKeep) -> None:
        lines, encoding = keep.lines, FLOAT_ENCODINGS[work.compute]
        self._length, self._group = lines.length, lines.group
        self._known = keep.marks if known_bytes(work) else None
        # Several elements for a bin of a usual magnitude, as each bin takes time, too.
        mantissa = min(max(lines.length.bit_length() - 7, 3), MANTISSA_BITS[work.compute])
        by_rank, (cut, cut_keeps) = keep.by_rank().astype(np.float32), keep.cut
        grows = (np.diff(by_rank) >= 0).all(axis=1) & (by_rank[:, 0] >= 0) & (by_rank[:, -1] <= 1)
        self._lines: Any = prepare(
            LaidOutLines(
                lines.length,
                lines.inner,
                encoding.mantissa - mantissa,
                encoding.infinite << encoding.mantissa,
                np.array(streams, np.uint64),
                by_rank,
                _shares(by_rank),
                grows,
                cut,
                np.ascontiguousarray(cut_keeps.astype(np.float32)),
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        # Other processes rank again: marks may be larger than the elements of a few spans.
        return {**vars(self), "_known": None}

    @contextmanager
    def marked(self, scratch: Scratch, first: int, count: int, data: Any) -> Iterator[None]:
        """A context in which the marks of a slice are in the buffers; it is read, too, unless they were known."""
        scratch.make_marks(count)
        known = None if self._known is None else self._known.get(first)
        if known is not None and known.shape[1] == -(-count // 8):
            scratch.buffers.value.marks[:, :count] = np.unpackbits(known, axis=1, count=count)
            yield
            return
        mark_lines(data, first, count, scratch.buffers, self._lines, scratch.line_buffers(self._length, self._group))
        window, scratch.files.slice[1] = int(scratch.files.slice[1]), 0
        yield
        scratch.files.slice[1] = window

    def packed(self, scratch: Scratch, count: int) -> Array | None:
        """The marks in the buffers, to be known in later passes; None if those of the tensor are too large."""
        if self._known is None:
            return None
        return np.packbits(scratch.buffers.value.marks[:, :count], axis=1)

    def remember(self, marks: Mapping[int, Array | None]) -> None:
        """Keep the packed marks of slices, by their first element, for later passes over the tensor."""
        if self._known is not None:
            self._known.update({first: bits for first, bits in marks.items() if bits is not None})


def _shares(by_rank: Array) -> Array:
    """Probabilities as multiples of 2⁻¹⁶, for :class:`~modelfuse.kernels.compiled.line_ranks.LaidOutLines`."""
    shares = np.zeros((by_rank.shape[0], by_rank.shape[1] + 4), np.uint16)
    shares[:, 2:-2] = np.clip(by_rank * np.float32(1 << 16), 0, (1 << 16) - 1)
    return shares
