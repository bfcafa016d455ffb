"""How a pass over tensors walks a slice: in blocks that fit the device's room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.kernels import Bytes, Extent, Work
from modelfuse.kernels.arrays.arithmetic import CHUNK, Arithmetic
from modelfuse.kernels.arrays.library import Array, Library, Tensor


@dataclass
class ArrayState:
    """A span under way: what it found so far, and what it needs on the device."""

    bad: Array
    found: Any = None
    placed: Any = None
    prefixes: Any = None
    counts: list[Tensor] = field(default_factory=list)
    #: The probability of keeping each element of a slice, one row a model, and the slice's first element.
    keep: Array | None = None
    first: int = 0


class Walk:
    """What all passes share.

    Attributes:
        writes: Whether there is a result to store.
        fixed: Bytes on the device beside the blocks.
        scratch: Bytes on the device for each element, beside what is stored and what is decoded of it.
        once: Whether there is nothing to pay for each block, so that small ones are best.
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
        """Libraries take what lies in the host's memory."""
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
        """Elements of a block, so that the room holds: a multiple of CHUNK, at least one."""
        work, library = self._work, self._library
        width = 4 if work.compute == "float32" else 8
        an_element = sum(source.bytes for source in work.sources) + width * len(work.sources) + self.scratch
        elements = max(library.worker_bytes - self.fixed, 0) // an_element
        return max((min(elements, library.most) if self.once else elements) // CHUNK, 1) * CHUNK

    def _load(self, state: ArrayState, raws: Bytes, start: int, size: int) -> list[Tensor]:
        """The models' elements, less the base's where they are none to it yet; then the base's."""
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
        """Fetched once a slice: each time the worker must wait for the device."""
        for counts in state.counts:
            values = self._library.fetch(counts)
            if values.ndim:
                state.bad[:-1] += values
            else:
                state.bad[-1] += values
        state.counts.clear()

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        """Work on one block.

        Args:
            state: What ``start`` gave.
            first: The number of the block's first element in the tensor.
            xs: The models' elements, or differences to the base, on the device; may be used up.
            base: The base's elements if there is a base.
            out: Room for the stored result.
        """
        raise NotImplementedError
