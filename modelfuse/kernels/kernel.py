"""What merges tensors: compiled loops, or arrays of a library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import numpy as np

from modelfuse.kernels import Bytes, Procedure, Work

if TYPE_CHECKING:
    from modelfuse.kernels.arrays.library import Library

#: What compiles what was never compiled: nothing, as for small work; another process; or this one, which takes less
#: memory, but has to wait.
Compiler = Literal["none", "beside", "here"]


class Kernel(ABC):
    """What merges tensors: one seam between the run and every kind of kernel."""

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        """Memory for stored bytes, which a worker's reads fill and its writes take, uint8."""
        return np.empty(shape, np.uint8)

    def running(self) -> AbstractContextManager[None]:
        """What must be set in the main thread while workers use the kernel."""
        return nullcontext()

    @abstractmethod
    def merge(self, work: Work) -> Procedure:
        """The passes that merge one tensor."""


class CompiledKernel(Kernel):
    """Compiled loops over the bytes as they are stored."""

    def merge(self, work: Work) -> Procedure:
        from modelfuse.kernels.compiled.backend import merge_procedure

        return merge_procedure(work)


class ArrayKernel(Kernel):
    """Tensors of a library on one device."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        return self.library.buffer(shape)

    def running(self) -> AbstractContextManager[None]:
        return self.library.running()

    def merge(self, work: Work) -> Procedure:
        from modelfuse.kernels.arrays.passes import merge_procedure

        return merge_procedure(work, self.library)
