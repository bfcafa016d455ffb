"""A sample of a comparison: some runs of elements of every tensor, the same runs of all models."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from modelfuse.planning.diff_plan import ComparedTensor, DiffPlan
from modelfuse.storage import Url
from modelfuse.storage.files import Buffer, keeping_open

#: The fewest runs and elements sampled of a tensor, and elements of all tensors; large tensors are sampled at one
#: element in SHARE.
LEAST_RUNS, LEAST, LEAST_IN_ALL, SHARE = 3, 1 << 11, 1 << 19, 2047
#: A run is a row, if its length is between these; else it has RUN elements.
SHORTEST_ROW, LONGEST_ROW, RUN = 32, 1 << 16, 1024
#: The most rows of a small matrix that is sampled completely, row by row.
MOST_ROWS = 256
#: The most elements of all sources in memory at a time.
MOST_ELEMENTS = 1 << 19
#: The fractional part of the golden ratio, whose multiples modulo 1 are spread evenly.
GOLDEN = 0.6180339887498949


class Runs(NamedTuple):
    """The runs that are sampled of a tensor.

    Attributes:
        number: The number of runs.
        length: Elements per run.
        are_outputs: Whether they are rows of one linear layer's outputs, so that interference can be estimated.
    """

    number: int
    length: int
    are_outputs: bool

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.number * self.length

    @classmethod
    def of(cls, tensor: ComparedTensor, least: int) -> Runs:
        """The runs of a tensor, of at least ``least`` elements; small tensors are sampled completely."""
        size, matrices = tensor.measurement.size, tensor.measurement.matrices
        columns = tensor.sources[-1].shape[-1] if len(tensor.sources[-1].shape) > 1 else 0
        are_rows = SHORTEST_ROW <= columns <= LONGEST_ROW
        length = columns if are_rows else RUN
        one_layer = matrices is not None and matrices.units == 1 and not matrices.parts and matrices.out_first
        are_outputs = are_rows and one_layer
        count = max(LEAST_RUNS, -(-least // length), size // (SHARE * length))
        if 2 * count * length > size:
            count = size // length
            return cls(count, length, True) if are_outputs and LEAST_RUNS <= count <= MOST_ROWS else cls(1, size, False)
        return cls(count, length, are_outputs)

    def starts(self, name: str, size: int) -> list[int]:
        """The index of the first element of each run: one run per equal part of the tensor, at varying offsets."""
        available, begin = size // self.length, zlib.crc32(name.encode()) / 2**32
        return [int((number + (begin + number * GOLDEN) % 1) * available / self.number) * self.length
                for number in range(self.number)]  # fmt: skip


@dataclass(frozen=True)
class SampleBatch:
    """Tensors that are measured together: their sources have the same dtypes, and their samples the same shape.

    Attributes:
        numbers: Their positions in the plan.
        tensors: The tensors.
        runs: The runs of each tensor.
    """

    numbers: tuple[int, ...]
    tensors: tuple[ComparedTensor, ...]
    runs: Runs

    @property
    def bytes_read(self) -> int:
        """The number of bytes to read from all sources."""
        each = sum(source.stored.nbytes(self.runs.elements) for source in self.tensors[0].sources)
        return len(self.tensors) * each

    @cached_property
    def starts(self) -> list[list[int]]:
        """The index of the first element of each run, for each tensor."""
        return [self.runs.starts(each.name, each.measurement.size) for each in self.tensors]

    def read(self, source: int, buffer: Buffer) -> None:
        """Read the samples of all tensors from one of their sources.

        Args:
            source: The index of the source.
            buffer: Receives the samples of the tensors, one after another.

        Raises:
            CheckpointError: If a file has changed or cannot be read.
        """
        nbytes, done = self.tensors[0].sources[source].dtype.nbytes(self.runs.length), 0
        with keeping_open():
            for each, starts in zip(self.tensors, self.starts, strict=True):
                with each.sources[source].open() as read:
                    for start in starts:
                        read(start, buffer[done : done + nbytes])
                        done += nbytes

    def expect(self) -> None:
        """Announce the reads, so that remote ranges are fetched together."""
        for each, starts in zip(self.tensors, self.starts, strict=True):
            for source in each.sources:
                for start in starts if isinstance(source.file.path, Url) else ():
                    source.expect(start, self.runs.length)


def sample_of(plan: DiffPlan) -> list[SampleBatch]:
    """The batches of a sample of all tensors of a plan."""
    alike: dict[tuple[object, Runs], list[int]] = {}
    least = max(LEAST, LEAST_IN_ALL // len(plan.tensors))
    for number, tensor in enumerate(plan.tensors):
        measurement = tensor.measurement
        key = measurement.dtypes, measurement.models, tensor.models
        alike.setdefault((key, Runs.of(tensor, least)), []).append(number)
    return [batch for (_, runs), numbers in alike.items() for batch in _batches(plan.tensors, numbers, runs)]


def _batches(tensors: Sequence[ComparedTensor], numbers: Sequence[int], runs: Runs) -> Iterator[SampleBatch]:
    sources = len(tensors[numbers[0]].sources)
    most = max(MOST_ELEMENTS // (runs.elements * sources), 1)
    for begin in range(0, len(numbers), most):
        some = tuple(numbers[begin : begin + most])
        yield SampleBatch(some, tuple(tensors[number] for number in some), runs)
