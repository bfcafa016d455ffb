"""Base of all passes over tensors: processes a slice in blocks that fit the worker's memory on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct, field

from modelfuse.kernels import Bytes, Extent, Work
from modelfuse.kernels.arrays.arithmetic import CHUNK, Arithmetic
from modelfuse.kernels.arrays.library import Array, Library, Tensor


class ArrayState(Struct):
    """The state of a span: its finding so far, and its arrays on the device."""

    bad: Array
    found: Any = None
    placed: Any = None
    prefixes: Any = None
    counts: list[Tensor] = field(default_factory=list)
    #: The probability of keeping each element of a slice (one row per model), and the slice's first element.
    keep: Array | None = None
    first: int = 0


class Walk:
    """Base class of passes.

    Attributes:
        writes: Whether the pass writes a result.
        fixed: Bytes on the device that do not depend on the block.
        scratch: Bytes on the device per element, beside its stored and decoded values.
        once: Whether blocks have no fixed cost, so that small ones are best.
    """

    writes = False
    once = True
    fixed = 0
    scratch = 0

    def __init__(self, work: Work, library: Library) -> None:
        self._work, self._library = work, library
        self._arithmetic = Arithmetic(library, work.compute)
        self._deltas = work.deltas or (False,) * work.models

    def start(self) -> ArrayState:
        return self._state()

    def _state(self, found: Any = None, placed: Any = None) -> ArrayState:
        return ArrayState(np.zeros(len(self._work.sources) + 1, np.int64), found, placed)

    def read_from(self, state: ArrayState, extents: Sequence[Extent]) -> bool:
        """False: elements are read to host memory."""
        return False

    def apply(self, state: ArrayState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        work, library = self._work, self._library
        step = self._step()
        with library.working():
            for start in range(0, count, step):
                size = min(step, count - start)
                loaded = self._load(state, raws, start, size)
                base = loaded.pop() if work.has_base else None
                stored = out[work.out.nbytes(start) : work.out.nbytes(start + size)]
                self.block(state, first + start, loaded, base, stored)
            self._add_counts(state)

    def _step(self) -> int:
        """Elements of a block that fits ``worker_bytes``: a multiple of CHUNK, at least one CHUNK."""
        work, library = self._work, self._library
        width = 4 if work.compute == "float32" else 8
        an_element = sum(source.bytes for source in work.sources) + width * len(work.sources) + self.scratch
        elements = max(library.worker_bytes - self.fixed, 0) // an_element
        return max((min(elements, library.most) if self.once else elements) // CHUNK, 1) * CHUNK

    def _load(self, state: ArrayState, raws: Bytes, start: int, size: int) -> list[Tensor]:
        """The models' differences to the base (or their elements, without a base), then the base's elements."""
        work, arithmetic = self._work, self._arithmetic
        loaded = []
        for raw, source in zip(raws, work.sources, strict=True):
            stored = self._library.load(raw[source.nbytes(start) : source.nbytes(start + size)], source)
            loaded.append(arithmetic.decode(stored))
        counts = [arithmetic.count_bad(x) for x in loaded]
        state.counts.append(self._library.stack(*counts))
        if work.has_base:
            for model, is_delta in enumerate(self._deltas):
                loaded[model] = loaded[model] if is_delta else loaded[model] - loaded[-1]
        return loaded

    def _add_counts(self, state: ArrayState) -> None:
        """Add the counts of non-finite elements; once per slice, as the worker must wait for the device."""
        for counts in state.counts:
            values = self._library.fetch(counts)
            if values.ndim:
                state.bad[:-1] += values
            else:
                state.bad[-1] += values
        state.counts.clear()

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        """Process one block.

        Args:
            state: The span's state.
            first: The index of the block's first element in the tensor.
            xs: The models' elements, or differences to the base, on the device; may be overwritten.
            base: The base's elements, if there is a base.
            out: The buffer for the encoded result.
        """
        raise NotImplementedError
