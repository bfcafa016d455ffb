"""Choose the number of workers and the slice size that keep a merge within its memory budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from modelfuse.dtypes import F64, computed_in
from modelfuse.kernels import CPU_BLOCK, CPU_WORKER_BYTES
from modelfuse.kernels.backends import GPU_WORKER_BYTES, Device, find_gpu
from modelfuse.kernels.kernel import Compiler
from modelfuse.kernels.line_marks import can_mark, marking_bytes
from modelfuse.kernels.lines import Lines
from modelfuse.kernels.matrices import memory_of
from modelfuse.kernels.measures import ranked_lines
from modelfuse.methods.spec import Divergence, LineRanks
from modelfuse.planning.operations import Operation, methods_of
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import Url

#: The CPU quota of a container: microseconds of CPU time per period in microseconds, or "max".
CONTAINER_SHARE = Path("/sys/fs/cgroup/cpu.max")
#: The smallest slice, in elements. Slices start at multiples of it, so that sums and checksums do not depend on them.
GRAIN = 1 << 18
#: Elements of a slice if the budget allows: large enough that the overhead per slice is small.
SLICE = 1 << 20
#: Elements of a slice of tensors that are read in another order than stored, as every slice touches the same pages,
#: and of slices for a GPU, as every slice costs kernel launches.
SLICE_LARGE = 1 << 22
#: Elements of a span: a worker processes one before it takes the next from the queue.
SPAN = 1 << 22
#: Resident memory of the interpreter with all modules and the library.
INTERPRETER_BYTES = {"np": 64_000_000, "pt": 330_000_000, "pd": 400_000_000}
#: Added by compiling in this process; also by kernels with tallies, and by kernels that compute in float64.
COMPILING_BYTES, TALLYING_BYTES, DOUBLE_BYTES = 190_000_000, 45_000_000, 55_000_000
#: The numpy backend: its modules; the number of temporary arrays of one block per worker; its tallies, per model.
ARRAY_BYTES, ARRAYS, ARRAY_TABLE_BYTES = 8_000_000, 16, 400_000
#: Metadata of each model.
MODEL_BYTES = 100_000
#: Added by Ray in its worker processes, measured.
RAY_BYTES = 70_000_000
#: Tensors of a worker of torch or Paddle on the CPU, with freed memory that the allocator keeps, measured.
SCRATCH_BYTES = 75_000_000
#: Added by a GPU's libraries and driver: an estimate.
GPU_BYTES = 400_000_000
#: torch rounds pinned memory up to a power of two.
PINNED_SHARE = 2
#: Workers for a GPU: one reads, one waits for the device, one writes.
GPU_WORKERS = 3
#: Share of a GPU's memory for tensors, as its allocator rounds up and keeps freed memory.
GPU_SHARE = 0.7
#: The least GPU memory of a worker, including its tallies.
LEAST_GPU_WORKER_BYTES = 44_000_000
#: Divergences and what they are computed from, per row.
ROW_BYTES = 250
#: Plan and report: bytes per output tensor, and per source of it.
OUTPUT_BYTES, SOURCE_BYTES = 700, 300
#: Tallies of a tensor that is being measured, and of the worker that counts them, per model.
TABLE_BYTES = 2_500_000
#: Bytes of an output in a store that may be buffered until the bytes before them in their file are sent.
MOST_WAITING = 64_000_000
#: obstore and its threads, measured; bytes that are being uploaded or are buffered for it.
REMOTE_BYTES, SENT_BYTES = 35_000_000, 140_000_000
#: The largest range of a remote file that is fetched by one request. A worker holds a span of each source and the ends
#: of the ranges that it begins and ends in.
RANGE_BYTES = 1 << 23
#: The least workers for remote inputs: one processes while another waits.
REMOTE_WORKERS = 2
#: If the budget allows, the most bytes to fetch ahead (more is not faster, as less memory is reused sooner), and the
#: most bytes to keep for methods that read a tensor twice.
MOST_AHEAD, MOST_KEPT = 32_000_000, 2_000_000_000
#: The number of computed tensors whose parts stay cached after they were read.
KEPT = 2


class MemoryDemand(NamedTuple):
    """Memory demand of a merge.

    Attributes:
        outputs: The number of output tensors.
        sources: The number of models, the base included.
        sizes: For each kind of tensor: its elements, the elements that a pass needs at a time even if slices are
            smaller, and the bytes of one element in all sources and the output.
        a_reader: The most bytes that readers of a source need beside the buffers.
        held: The most bytes that computing the sources of one tensor keeps in memory.
        double: Whether any tensor is computed in float64.
        remote: The most bytes of one element in all sources if inputs are in stores, else 0.
        spans: The number of spans, which bounds the number of workers that hold slices.
        compiled: Whether all kernels that are needed are in the code cache.
        nbytes: The stored bytes of all sources.
        counted: The most sources of a tensor whose magnitudes are counted; 0 if there is none.
        twice: Whether any tensor is read twice.
        whole: The most bytes that a worker needs beside its buffers for whole matrices or lines of a tensor.
    """

    outputs: int
    sources: int
    sizes: frozenset[tuple[int, int, int]]
    a_reader: int
    held: int
    double: bool
    remote: int = 0
    spans: int = 1 << 62
    compiled: bool = False
    nbytes: int = 0
    counted: int = 0
    twice: bool = False
    whole: int = 0

    def slice_bytes(self, elements: int) -> int:
        """Bytes of a worker's buffers for slices of so many elements."""
        return max(min(max(elements, window), size) * an_element for size, window, an_element in self.sizes)


class Budget(NamedTuple):
    """Workers, slices and memory of a merge.

    Attributes:
        workers: Parallel workers; fewer than ``n_process`` if the memory budget requires it.
        slice_elements: Elements of a slice.
        memory: The expected peak of resident memory in bytes.
        device: The device, and how much of its memory each worker may use.
        fetched: Capacity of the range cache for files in stores, in bytes; 0 without such files.
        compiler: Where kernels are compiled that are not in the code cache.
    """

    workers: int
    slice_elements: int
    memory: int
    device: Device
    fetched: int
    compiler: Compiler


def fit_memory(recipe: Recipe, demand: MemoryDemand) -> Budget:
    """Choose the slice size, and as many workers as the budget and the recipe allow, at least one.

    The first merge of a kind on a machine needs more memory, as its kernels are not compiled yet.

    Raises:
        MissingExtraError: If the library of ``tensor_type`` is not installed, or is installed without GPU support.
        RecipeError: If ``device`` needs a GPU and there is none that it can use.
    """
    gpu = find_gpu(recipe.tensor_type, recipe.device, recipe.allow_cpu_fallback)
    if recipe.tensor_type != "np" or recipe.engine != "local":
        return _fit(recipe, demand, gpu, "none" if recipe.tensor_type != "np" else "here")
    from modelfuse.kernels.adaptive import COMPILER_BYTES, is_compiled_for

    budget = _fit(recipe, demand, gpu, "none")
    if demand.compiled or not is_compiled_for(demand.nbytes):
        return budget
    memory = budget.memory + COMPILER_BYTES
    return (
        budget._replace(memory=memory, compiler="beside")
        if memory <= recipe.memory
        else _fit(recipe, demand, gpu, "here")
    )


def _fit(recipe: Recipe, demand: MemoryDemand, gpu: bool, compiler: Compiler) -> Budget:
    """Choose the slice size and the number of workers for a given compiler."""
    by_arrays = recipe.tensor_type == "np" and compiler == "none" and not demand.compiled
    tables = (ARRAY_TABLE_BYTES if by_arrays else TABLE_BYTES) * demand.counted
    scratch = 0 if gpu or recipe.tensor_type == "np" else SCRATCH_BYTES
    if by_arrays:
        largest = max(size for size, _, _ in demand.sizes)
        scratch = min(CPU_BLOCK, largest) * ARRAYS * (8 if demand.double else 4)
    fixed = INTERPRETER_BYTES[recipe.tensor_type] + by_arrays * ARRAY_BYTES + tables
    if compiler == "here" or recipe.tensor_type != "np":
        fixed += (demand.counted > 0) * TALLYING_BYTES + demand.double * DOUBLE_BYTES
        fixed += COMPILING_BYTES if compiler == "here" else 0
    fixed += demand.sources * MODEL_BYTES
    fixed += demand.outputs * (OUTPUT_BYTES + demand.sources * SOURCE_BYTES) + gpu * GPU_BYTES
    fixed += RAY_BYTES * (recipe.engine == "ray")
    sends = isinstance(recipe.output_path, Url)
    fixed += REMOTE_BYTES * (sends or demand.remote > 0) + SENT_BYTES * sends
    fixed += demand.held * KEPT

    fetched = SPAN * demand.remote + demand.sources * RANGE_BYTES if demand.remote else 0

    def a_worker(elements: int) -> int:
        buffers = demand.slice_bytes(elements) * (PINNED_SHARE if gpu else 1)
        return buffers + demand.whole + demand.a_reader + demand.held + tables + scratch + fetched

    most = _most_workers(recipe, gpu, demand.remote > 0)
    elements = SLICE_LARGE if demand.a_reader or demand.held or gpu else SLICE
    while elements > GRAIN and fixed + most * a_worker(elements) > recipe.memory:
        elements //= 2
    workers = max(1, min(most, (recipe.memory - fixed) // max(a_worker(elements), 1)))
    device = Device(recipe.tensor_type, gpu, _worker_bytes(recipe, gpu, workers))
    memory = fixed + min(workers, demand.spans) * a_worker(elements)
    most = MOST_KEPT if demand.twice else MOST_AHEAD
    more = min(max(recipe.memory - memory, 0), most) if fetched else 0
    return Budget(workers, elements, memory + more, device, workers * fetched + more, compiler)


def demand_of(recipe: Recipe, operations: Sequence[Operation]) -> MemoryDemand:
    """The memory demand of operations."""
    sources = [part for each in operations for part in each.sources]
    # All rows of a slice have the width of the widest source.
    sizes = {
        (each.size, each.window, len(each.sources) * max(part.dtype.bytes for part in each.sources) + each.dtype.bytes)
        for each in operations
    }
    # Sources in stores must all be fetched before a slice is processed.
    fetched = max(sum(part.stored.bytes for part in each.sources) for each in operations)
    if not any(isinstance(path, Url) for path in recipe.input_paths):
        fetched = 0
    compiled = _are_compiled(recipe, operations)
    return MemoryDemand(
        outputs=len(operations),
        sources=max(len(each.sources) for each in operations),
        sizes=frozenset(sizes),
        a_reader=max(part.reader_bytes for part in sources),
        held=max(sum(part.held for part in each.sources) for each in operations),
        double=computed_in(*{part.dtype for part in sources}) is F64,
        remote=fetched,
        spans=sum(1 if each.window else -(-each.size // SPAN) for each in operations),
        compiled=compiled,
        nbytes=sum(each.bytes_read for each in operations),
        counted=max(_counted_sources(each) for each in operations),
        twice=any(method.reads_twice for method in methods_of(operations)),
        whole=max(_matrix_bytes(each) + _line_bytes(each, compiled) for each in operations),
    )


def _matrix_bytes(operation: Operation) -> int:
    how = operation.method.combination.matrix if operation.method is not None else None
    if operation.matrices is None or how is None or operation.action != "merge":
        return 0
    return memory_of(operation.matrices, how, len(operation.models))


def _line_bytes(operation: Operation, compiled: bool) -> int:
    """Bytes of what is known of each line; of arrays where there is no compiled loop, and of ranks within lines."""
    method = operation.method
    if method is None or operation.action != "merge":
        return 0
    work, found, arrays = operation.work, 0, method.by_arrays
    for each in (*method.element_measures, *method.merged_measures):
        if isinstance(each, Divergence):
            found += ROW_BYTES * Lines.along(work.shape, work.size, -1).number
        if isinstance(each, LineRanks):
            lines = ranked_lines(work, each)
            marks = compiled and can_mark(method.chain, lines)
            # Of lines that slices cut, magnitudes and probabilities; arrays have those of whole slices, too.
            elements = lines.cut_by(GRAIN, work.size) + (0 if marks else min(work.size, SLICE))
            found += elements * work.models * 2 * (8 if work.compute == "float64" else 4)
            found += marking_bytes(work, lines, SLICE) if marks else 0
            arrays |= not marks
    return found + arrays * SCRATCH_BYTES


def _are_compiled(recipe: Recipe, operations: Sequence[Operation]) -> bool:
    """Whether all kernels of a local merge with ``tensor_type`` np are in the code cache."""
    if recipe.tensor_type != "np" or recipe.engine != "local":
        return False
    from modelfuse.kernels.adaptive import are_compiled

    works = (each.work for each in operations if each.action != "copy" and not each.window)
    return are_compiled({(work.method.chain, work.compute, work.has_base): work for work in works}.values())


def _counted_sources(operation: Operation) -> int:
    method = operation.method
    return len(operation.sources) if method is not None and method.counts_magnitudes else 0


def processors() -> int:
    """The number of processors that this process may use, by its CPU affinity and the quota of its container.

    >>> processors() >= 1
    True
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CONTAINER_SHARE.read_text().split()
        return max(1, min(count, -(-int(quota) // int(period))))
    return count


def _most_workers(recipe: Recipe, gpu: bool, remote: bool) -> int:
    if not gpu:
        if recipe.engine == "ray":  # Each of its processes is one worker.
            return 1
        return max(recipe.n_process or processors(), REMOTE_WORKERS if remote else 1)
    workers = max(recipe.n_process or 1, GPU_WORKERS)
    if recipe.device == "low_gpu_mem":
        workers = min(workers, int(recipe.gpu_memory * GPU_SHARE) // LEAST_GPU_WORKER_BYTES)
    return workers


def _worker_bytes(recipe: Recipe, gpu: bool, workers: int) -> int:
    """Bytes of device memory for each worker."""
    if not gpu:
        return CPU_WORKER_BYTES
    return int(recipe.gpu_memory * GPU_SHARE) // workers if recipe.device == "low_gpu_mem" else GPU_WORKER_BYTES
