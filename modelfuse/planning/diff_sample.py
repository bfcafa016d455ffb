"""A sample of what ``diff`` compares: of every tensor some blocks of elements, the same of all models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from modelfuse.checkpoints.tensors import PartialTensor, Reader
from modelfuse.planning.diff_plan import ComparedTensor, DiffPlan
from modelfuse.storage.files import Buffer

#: Elements of a block; about the fewest elements of a tensor that has more, and of all together.
BLOCK, LEAST, LEAST_IN_ALL = 1 << 12, 1 << 13, 1 << 21


@dataclass(frozen=True, slots=True)
class SampledTensor(PartialTensor):
    """Every so many blocks of a tensor's elements, one after another.

    Attributes:
        stride: Of so many blocks, the first is there.
    """

    stride: int

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        with self.source.open() as read:
            width = self.dtype.bytes

            def blocks(start: int, buffer: Buffer) -> None:
                done, whole = 0, memoryview(buffer).cast("B")
                while done < len(whole):
                    block, inside = divmod(start + done // width, BLOCK)
                    count = min(BLOCK - inside, (len(whole) - done) // width)
                    read(block * self.stride * BLOCK + inside, whole[done : done + count * width])
                    done += count * width

            yield blocks


def sampled(plan: DiffPlan, stride: int) -> DiffPlan:
    """The plan of a sample; no matrix is whole in it, so that there is no interference.

    Args:
        plan: All that could be compared.
        stride: Of so many blocks of a large tensor one is read, of a smaller tensor of fewer; an odd number, lest
            blocks be the same columns of every row.
    """
    least = max(LEAST, LEAST_IN_ALL // len(plan.tensors))
    return replace(plan, tensors=tuple(_sampled(each, stride, least) for each in plan.tensors))


def _sampled(tensor: ComparedTensor, stride: int, least: int) -> ComparedTensor:
    size = tensor.measurement.size
    stride = min(stride, size // least)
    stride -= 1 - stride % 2
    if stride < 3:
        return replace(tensor, measurement=replace(tensor.measurement, matrices=None))
    blocks, rest = divmod(size, BLOCK)
    chosen = -(-(blocks + bool(rest)) // stride)
    last_is_cut = rest > 0 and (chosen - 1) * stride == blocks
    count = chosen * BLOCK - (BLOCK - rest if last_is_cut else 0)
    sources = tuple(
        SampledTensor(each.name, each.dtype, (count,), each.file, each.offset, each, stride) for each in tensor.sources
    )
    measurement = replace(tensor.measurement, size=count, matrices=None)
    return replace(tensor, sources=sources, measurement=measurement, sample_of=tensor.sources[-1])
