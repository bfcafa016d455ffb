"""A sample of a comparison: some blocks of elements of every tensor, the same blocks of all models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from modelfuse.checkpoints.tensors import PartialTensor, Reader
from modelfuse.planning.diff_plan import ComparedTensor, DiffPlan
from modelfuse.storage.files import Buffer

#: Elements of a block; about the fewest elements sampled of a larger tensor, and of all tensors together.
BLOCK, LEAST, LEAST_IN_ALL = 1 << 12, 1 << 13, 1 << 21


@dataclass(frozen=True, slots=True)
class SampledTensor(PartialTensor):
    """Every ``stride``-th block of a tensor's elements, as one tensor.

    Attributes:
        stride: The distance of sampled blocks, in blocks.
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
    """The plan of a sample. It has no whole matrices, so interference is not measured.

    Args:
        plan: The full plan.
        stride: The distance of sampled blocks in large tensors, in blocks; less in smaller ones. Odd, so that blocks
            are not always the same columns of a matrix whose rows have a power of two elements.
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
