"""The interface between the run and the kernels, and its two implementations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import numpy as np

from modelfuse.kernels import Bytes, Procedure, Work

if TYPE_CHECKING:
    from modelfuse.kernels.arrays.library import Library

#: Where missing kernels are compiled: not at all (small merges), in a subprocess ("beside"), or in this process
#: ("here"), which takes less memory but makes the merge wait.
Compiler = Literal["none", "beside", "here"]


class Kernel(ABC):
    """Merges tensors: the interface of all kernels to the run."""

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        """Allocate a worker's input or output buffer, uint8."""
        return np.empty(shape, np.uint8)

    def running(self) -> AbstractContextManager[None]:
        """Context for the main thread while workers use the kernel."""
        return nullcontext()

    @abstractmethod
    def merge(self, work: Work) -> Procedure:
        """The procedure that merges one tensor."""


class CompiledKernel(Kernel):
    """Compiled loops over stored bytes."""

    def merge(self, work: Work) -> Procedure:
        from modelfuse.kernels.compiled.backend import merge_procedure

        return merge_procedure(work)


class ArrayKernel(Kernel):
    """Operations of an array or tensor library on one device."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def buffer(self, shape: tuple[int, ...]) -> Bytes:
        return self.library.buffer(shape)

    def running(self) -> AbstractContextManager[None]:
        return self.library.running()

    def merge(self, work: Work) -> Procedure:
        from modelfuse.kernels.arrays.passes import merge_procedure

        return merge_procedure(work, self.library)
