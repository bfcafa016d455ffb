"""A small weight file beside the model's own, merged in memory: that of a module of sentence-transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Recent, narrow, read_values
from modelfuse.checkpoints.adapters.factored import WholeTensor, merge_whole
from modelfuse.checkpoints.adapters.low_rank_terms import Shared, difference_type
from modelfuse.checkpoints.formats.safetensors import frame_safetensors
from modelfuse.dtypes import BF16, F16, DType
from modelfuse.methods.applied import Applied


class ModuleTensor(NamedTuple):
    """One of its tensors.

    Attributes:
        name: Its name in the file.
        dtype: The output type.
        shape: Its shape.
        sources: The models' tensors, the base's last if there is one.
        has_base: Whether there is a base.
        method: The method that merges them; None: the first is copied.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    has_base: bool
    method: Applied | None


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """The file.

    Attributes:
        name: Its path in the output.
        tensors: Its tensors.
        strict: Whether non-finite values are an error.
    """

    name: str
    tensors: tuple[ModuleTensor, ...]
    strict: bool

    @property
    def size(self) -> int:
        """Its approximate size in bytes."""
        return sum(each.dtype.nbytes(each.sources[0].size) for each in self.tensors)

    def content(self) -> bytes:
        """Merge all tensors, and encode them as a safetensors file."""
        frame = frame_safetensors([(each.name, each.dtype, each.shape) for each in self.tensors], {"format": "pt"})
        whole = bytearray(frame.size)
        for start, piece in frame.pieces:
            whole[start : start + len(piece)] = piece
        for tensor, offset in zip(self.tensors, frame.offsets, strict=True):
            values = self._bytes_of(tensor)
            whole[offset : offset + len(values)] = values
        return bytes(whole)

    def _bytes_of(self, tensor: ModuleTensor) -> bytes:
        first, size = tensor.sources[0], tensor.sources[0].size
        if tensor.method is None:
            raw = np.empty(first.dtype.nbytes(size), np.uint8)
            with first.open() as read:
                read(0, raw.data)
            return raw.tobytes()
        if tensor.has_base:
            kind, shared = difference_type(*tensor.sources), Shared(self.strict, Recent(most=1))
            made = WholeTensor(
                tensor.name, kind, tensor.shape, first.file, 0, tensor.name, tensor.sources, tensor.method, shared
            )  # fmt: skip
            with made.open() as read:
                values = read_values(read, kind, 0, size)
        else:
            values = merge_whole(tensor.name, tensor.sources, tensor.method, self.strict)
        if tensor.dtype in (BF16, F16):
            return narrow(tensor.dtype, values.astype(np.float32)).tobytes()
        return values.astype(tensor.dtype.numpy).tobytes()
