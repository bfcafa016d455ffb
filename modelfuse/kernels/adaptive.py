"""Use compiled loops where they are cached, and numpy until then: a merge never waits for the compiler.

Compiling takes longer than a small merge, so kernels that are not in the code cache are replaced by numpy operations
with the same bits. For large merges a subprocess compiles meanwhile, and tensors that start later use its result.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache, cached_property
from itertools import repeat
from typing import Any

import numpy as np
from msgspec.structs import replace

from modelfuse.dtypes import F32, F64
from modelfuse.kernels import CPU_BLOCK, CPU_WORKER_BYTES, Measured, Pass, Procedure, Work
from modelfuse.kernels.jit.compile import (
    NotCompiledError,
    announce,
    compiler_missing,
    compiling,
    nothing_compiled,
)
from modelfuse.kernels.kernel import ArrayKernel, CompiledKernel, Compiler, Kernel
from modelfuse.kernels.procedures import run_through
from modelfuse.kernels.sorted_magnitudes import MOST

#: Merges of fewer stored bytes than this never compile.
SMALL = 256_000_000
#: Sizes of the tensors that are merged to trigger compilation: magnitudes of small ones are sorted, not tallied.
REHEARSED = (1500, MOST + 1)
#: Resident memory of the compiling process in bytes, measured.
COMPILER_BYTES = 300_000_000
#: The program of the compiling process, with the module path of this one.
PROGRAM = "import sys; sys.path[:] = {!r}; from modelfuse.kernels.adaptive import compile_told; compile_told()"
SAYS = "Kernels are being compiled for this processor, once; numpy merges meanwhile."
SAYS_MISSING = "{}: numpy merges instead, with the same bytes, but slower."


@cache
def shared_kernel(is_small: bool) -> AdaptiveKernel:
    """The kernel for tensors that are merged while they are read as inputs: one for small, one for large work."""
    return AdaptiveKernel("none" if is_small else "beside")


def numpy_kernel() -> ArrayKernel:
    """A kernel of numpy operations, in blocks that stay in the CPU cache."""
    from modelfuse.kernels.arrays.numpy import NumpyLibrary

    return ArrayKernel(NumpyLibrary(CPU_WORKER_BYTES, CPU_BLOCK))


def rehearse(work: Work) -> None:
    """Merge a few elements with the compiled kernels of a tensor, which compiles them if that is allowed.

    Raises:
        NotCompiledError: If one of them is not cached and may not be compiled.
    """
    from modelfuse.kernels.compiled.scratch import drop_scratch

    try:
        for size in REHEARSED if work.method.counts_magnitudes else REHEARSED[:1]:
            _merge_some(work, size)
    finally:
        drop_scratch()


def _merge_some(work: Work, size: int) -> None:
    dtype = F32 if work.compute == "float32" else F64
    small = replace(work, size=size, sources=(dtype,) * len(work.sources), out=dtype, shape=())
    values = (np.sin(np.arange(size) * (number + 1.0)) for number in range(len(small.sources)))
    raws = np.stack([each.astype(work.compute).view(np.uint8) for each in values])
    out = np.empty(size * dtype.bytes, np.uint8)
    procedure = CompiledKernel().merge(small)
    if small.has_base:
        from modelfuse.kernels.compiled.base_distance import measured

        procedure = measured(procedure, small)

    def walk(pass_: Pass) -> list[Any]:
        state = pass_.start()
        pass_.apply(state, 0, size, raws, out)
        end = pass_.finish(state)
        return [end.found if isinstance(end, Measured) else end]

    run_through(procedure, walk)


def are_compiled(works: Iterable[Work]) -> bool:
    """Whether all kernels for such tensors are cached."""
    with nothing_compiled(), contextlib.suppress(NotCompiledError):
        for work in works:
            rehearse(work)
        return True
    return False


def is_compiled_for(nbytes: int) -> bool:
    """Whether kernels are compiled for a merge of ``nbytes`` stored bytes: it is large enough, and numba is there."""
    return nbytes >= SMALL and compiler_missing() is None


class Compilation:
    """A subprocess that compiles the kernels for one kind of tensor.

    Args:
        work: A tensor of that kind.
    """

    def __init__(self, work: Work) -> None:
        import subprocess  # Only merges that compile need it.

        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(sys.path)], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._process.stdin as words:
                words.write(pickle.dumps(work))

    @property
    def is_done(self) -> bool:
        """Whether the process has ended, successfully or not."""
        return self._process is None or self._process.poll() is not None


class AdaptiveKernel(Kernel):
    """Compiled loops for what is cached, numpy for the rest.

    Args:
        compiler: Where the rest is compiled, if anywhere.
    """

    def __init__(self, compiler: Compiler) -> None:
        self._compiled, self._compiler = CompiledKernel(), compiler
        self._known: dict[object, bool | Compilation] = {}
        self._lock = threading.Lock()

    @cached_property
    def _arrays(self) -> ArrayKernel:
        return numpy_kernel()

    def running(self) -> AbstractContextManager[None]:
        return nothing_compiled()

    def merge(self, work: Work) -> Procedure:
        # Methods of whole matrices always use numpy.
        chosen = self._compiled if work.matrices is None and self._is_ready(work) else self._arrays
        return chosen.merge(work)

    def _is_ready(self, work: Work) -> bool:
        measures = tuple(map(type, work.method.merged_measures))
        kind = (work.method.chain, work.compute, work.has_base, measures)
        with self._lock:
            known = self._known.get(kind)
            if known is None or (isinstance(known, Compilation) and known.is_done):
                self._known[kind] = known = self._look(work, tried=known is not None)
            return known is True

    def _look(self, work: Work, tried: bool) -> bool | Compilation:
        """Whether a tensor's kernels are cached; else the process that compiles them, if one is started."""
        try:
            # What the subprocess could not compile or cache (such as a method registered here only) is compiled here.
            with compiling(tried or self._compiler == "here"):
                rehearse(work)
        except NotCompiledError:
            if missing := compiler_missing():
                announce(SAYS_MISSING.format(missing))
            elif self._compiler == "beside":
                announce(SAYS)
                return Compilation(work)
            return False
        return True


def compile_told() -> None:
    """Compile the kernels for the pickled tensor on stdin, and those for adapters and 8-bit floats."""
    rehearse(pickle.loads(sys.stdin.buffer.read()))
    rehearse_inputs()


def rehearse_inputs() -> None:
    """Run the kernels of computed inputs (adapters, 8-bit floats) on a few elements."""
    from modelfuse.kernels.compiled.fp8 import Grid, expand
    from modelfuse.kernels.compiled.low_rank import add_low_rank

    for dtype in (np.float32, np.float64):
        add_low_rank(np.ones((2, 1), dtype), np.ones((1, 2), dtype), dtype(1), 0, np.zeros(4, dtype))
    codes, scales = np.zeros(4, np.uint8), np.ones((1, 1), np.float32)
    expand(codes, np.zeros(256, np.float32), Grid(2, 2, 2, 2), scales, 0, np.zeros(4, np.float32))


def warm(works: list[Work], said: Callable[[int], None] = lambda _: None) -> None:
    """Compile the kernels for such tensors.

    Args:
        works: One tensor of each kind.
        said: Called with the number of tensors that are done.
    """
    for number, work in enumerate(works, 1):
        rehearse(work)
        said(number)


def warm_products(methods: Iterable[str]) -> None:
    """Compile the products of matrices, if one of the methods needs them."""
    from modelfuse.methods.registry import METHODS

    solved = (METHODS[name].combination.matrix for name in methods)
    if any(each is not None and each.fixed_order for each in solved):
        from modelfuse.kernels.compiled.ordered_products import add_product

        add_product(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)))


def every_kind(methods: Iterable[str], models: int = 2) -> list[Work]:
    """A tensor of every kind that needs kernels of its own: per method, with and without a base, per compute type."""
    from modelfuse.methods.registry import every_chain

    works = []
    for method in every_chain(methods, models):
        for dtype, has_base in ((F32, True), (F32, False), (F64, True), (F64, False)):
            sources = tuple(repeat(dtype, models + has_base))
            works.append(Work("tensor", REHEARSED[0], sources, has_base, dtype, method))
    return works
