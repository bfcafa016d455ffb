"""How many workers and which slices keep a merge within its memory budget."""

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
from modelfuse.kernels.matrices import memory_of
from modelfuse.kernels.measures import ranked_lines
from modelfuse.methods.spec import LineRanks
from modelfuse.planning.operations import Operation, methods_of
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import Url

#: What Linux lets the processes of a container use, as microseconds of processors and of the clock, or "max".
CONTAINER_SHARE = Path("/sys/fs/cgroup/cpu.max")
#: The least elements of a slice. Whatever else slices could be, they start at multiples of this, so that sums and
#: checksums never depend on them.
GRAIN = 1 << 18
#: Elements of a slice where there is memory: so many that handling it costs little beside the work on it.
SLICE = 1 << 20
#: What is read in another order than it is stored in touches the same pages again for every slice, and a GPU is told
#: what to do for every slice: larger ones.
SLICE_LARGE = 1 << 22
#: Elements a worker walks between two looks at the queue.
SPAN = 1 << 22
#: Resident memory of the interpreter with all modules and the library.
INTERPRETER_BYTES = {"np": 64_000_000, "pt": 330_000_000, "pd": 400_000_000}
#: What compiling in this process adds to it, and more of it where kernels tally, and where some compute in float64.
COMPILING_BYTES, TALLYING_BYTES, DOUBLE_BYTES = 190_000_000, 45_000_000, 55_000_000
#: numpy's arrays in place of compiled loops: their modules; as wide as so many of the block that a worker is at; their
#: tables of counted magnitudes, for each model.
ARRAY_BYTES, ARRAYS, ARRAY_TABLE_BYTES = 8_000_000, 16, 400_000
#: What is known of each model.
MODEL_BYTES = 100_000
#: What Ray adds to it in its worker processes, measured.
RAY_BYTES = 70_000_000
#: A worker's tensors on the CPU, with what the allocator keeps of those that were freed, measured.
SCRATCH_BYTES = 75_000_000
#: What a GPU's libraries and driver add to it: an estimate.
GPU_BYTES = 400_000_000
#: torch rounds memory that a GPU copies from up to a power of two.
PINNED_SHARE = 2
#: On a GPU, one worker reads, one waits for the device and one writes.
GPU_WORKERS = 3
#: A GPU's allocator rounds up and keeps what was freed: so much of the memory is for tensors.
GPU_SHARE = 0.7
#: The least of a GPU's memory that a worker can do with, its tallies' tables included.
LEAST_GPU_WORKER_BYTES = 44_000_000
#: What the plan and the report remember of an output tensor, and of each of its sources.
OUTPUT_BYTES, SOURCE_BYTES = 700, 300
#: Tables of a tensor under way and of the worker that makes them, for each model.
TABLE_BYTES = 2_500_000
#: Bytes of an output in a store that may wait for what comes before them in their file; with more, workers wait, too.
MOST_WAITING = 64_000_000
#: What obstore and its threads add to the interpreter, measured; what is on its way to a store or waits for its turn.
REMOTE_BYTES, SENT_BYTES = 35_000_000, 140_000_000
#: The largest range of a file that is fetched by itself. Of what is fetched, a span of each source is worked on while
#: the next one comes; with the ends of the ranges that it begins and ends in.
RANGE_BYTES = 1 << 23
#: While one worker waits, another one works.
REMOTE_WORKERS = 2
#: Where the budget has room, the most to fetch ahead beside that: less room that is used again soon is quicker.
#: And the most to keep, for methods that read a tensor twice.
MOST_AHEAD, MOST_KEPT = 32_000_000, 2_000_000_000
#: Tensors that are computed, whose parts are kept beside those of the tensors under way.
KEPT = 2


class MemoryDemand(NamedTuple):
    """What the tensors of a merge weigh.

    Attributes:
        outputs: The number of output tensors.
        sources: The number of models, the base included.
        sizes: For each kind of tensor, the number of its elements, how many are needed at a time though slices are
            smaller, and the bytes of one in all sources and the output.
        a_reader: Bytes that reading takes beside that, at most.
        held: Bytes that computing the sources of one tensor keeps resident, at most.
        double: Whether any is computed in float64.
        remote: The most bytes of an element in all sources that are in stores.
        spans: How many there are: more workers never hold slices at a time.
        compiled: Whether all kernels that it takes were compiled before.
        nbytes: The stored bytes of all sources.
        counted: The most sources of a tensor whose magnitudes are counted; zero if there is none.
        twice: Whether any tensor is read twice.
        whole: The most bytes that a worker takes for a tensor of which it needs whole matrices or lines, beside its
            buffers.
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
        """What a worker holds of the largest slice of so many elements."""
        return max(min(max(elements, window), size) * an_element for size, window, an_element in self.sizes)


class Budget(NamedTuple):
    """What a merge may use.

    Attributes:
        workers: Parallel workers; fewer than asked for where the budget wants it.
        slice_elements: Elements a worker holds at a time.
        memory: The expected peak of resident memory in bytes.
        device: Where to merge, and how much of its memory each worker may fill.
        fetched: Bytes of files in stores to hold, beside those that are being read; zero if there are none.
        compiler: What compiles kernels that never were.
    """

    workers: int
    slice_elements: int
    memory: int
    device: Device
    fetched: int
    compiler: Compiler


def fit_memory(recipe: Recipe, demand: MemoryDemand) -> Budget:
    """Choose slices, and as many workers as the budget and the recipe allow, at least one.

    The first merge of a kind on a machine takes more, as its kernels are not compiled yet.

    Raises:
        MissingExtraError: If the library that ``tensor_type`` needs is not installed, or not the one for GPUs.
        RecipeError: If there is no GPU that it can use.
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
    """The same, given what compiles."""
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
    fixed += demand.held * KEPT  # What tensors that were read last are computed from is kept too.

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
    """What operations need, whatever the budget is."""
    sources = [part for each in operations for part in each.sources]
    # A slice's rows are as wide as the widest of its sources.
    sizes = {
        (each.size, each.window, len(each.sources) * max(part.dtype.bytes for part in each.sources) + each.dtype.bytes)
        for each in operations
    }
    # Of files in stores, an element's bytes in all of its sources have to be there at a time.
    fetched = max(sum(part.stored.bytes for part in each.sources) for each in operations)
    if not any(isinstance(path, Url) for path in recipe.input_paths):
        fetched = 0
    return MemoryDemand(
        outputs=len(operations),
        sources=max(len(each.sources) for each in operations),
        sizes=frozenset(sizes),
        a_reader=max(part.reader_bytes for part in sources),
        held=max(sum(part.held for part in each.sources) for each in operations),
        double=computed_in(*{part.dtype for part in sources}) is F64,
        remote=fetched,
        spans=sum(1 if each.window else -(-each.size // SPAN) for each in operations),
        compiled=_compiled(recipe, operations),
        nbytes=sum(each.bytes_read for each in operations),
        counted=max(_counted(each) for each in operations),
        twice=any(method.reads_twice for method in methods_of(operations)),
        whole=max(_whole(each) + _lines(each) for each in operations),
    )


def _whole(operation: Operation) -> int:
    how = operation.method.combination.matrix if operation.method is not None else None
    if operation.matrices is None or how is None or operation.action != "merge":
        return 0
    return memory_of(operation.matrices, how, len(operation.models))


def _lines(operation: Operation) -> int:
    """What arrays take where loops are compiled for the rest, and the ranks of lines that slices cut."""
    method = operation.method
    if method is None or operation.action != "merge" or not method.by_arrays:
        return 0
    work = operation.work
    ranked = [ranked_lines(work, each) for each in method.element_measures if isinstance(each, LineRanks)]
    elements = sum(min(work.size, SLICE) + each.cut_by(GRAIN, work.size) for each in ranked)
    return SCRATCH_BYTES + elements * work.models * 2 * (8 if work.compute == "float64" else 4)


def _compiled(recipe: Recipe, operations: Sequence[Operation]) -> bool:
    """Whether all kernels that a merge on this machine takes were compiled before."""
    if recipe.tensor_type != "np" or recipe.engine != "local":
        return False
    from modelfuse.kernels.adaptive import are_compiled

    works = (each.work for each in operations if each.action != "copy" and not each.window)
    return are_compiled({(work.method.chain, work.compute, work.has_base): work for work in works}.values())


def _counted(operation: Operation) -> int:
    method = operation.method
    return len(operation.sources) if method is not None and method.counts_magnitudes else 0


def processors() -> int:
    """Processors that this process may use: where the system tells, those that it is bound to, and a container's share.

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
        if recipe.engine == "ray":  # Each of its processes is one.
            return 1
        return max(recipe.n_process or processors(), REMOTE_WORKERS if remote else 1)
    workers = max(recipe.n_process or 1, GPU_WORKERS)
    if recipe.device == "low_gpu_mem":
        workers = min(workers, int(recipe.gpu_memory * GPU_SHARE) // LEAST_GPU_WORKER_BYTES)
    return workers


def _worker_bytes(recipe: Recipe, gpu: bool, workers: int) -> int:
    """Bytes of the device's memory for each worker."""
    if not gpu:
        return CPU_WORKER_BYTES
    return int(recipe.gpu_memory * GPU_SHARE) // workers if recipe.device == "low_gpu_mem" else GPU_WORKER_BYTES
