"""How many workers and which slices keep a merge within its memory budget."""

from __future__ import annotations

from typing import NamedTuple

from modelfuse.kernels.choice import CPU_ROOM, GPU_ROOM, Device, find_gpu
from modelfuse.recipe import Recipe

#: Elements of a slice: they stream best through the second-level cache. Whatever else slices could be, they start at
#: multiples of this, so that sums and checksums never depend on them.
GRAIN = 1 << 18
#: What is read in another order than it is stored in touches the same pages again for every slice, and a GPU is told
#: what to do for every slice: larger ones.
SLICE_LARGE = 1 << 22
#: Elements a worker walks between two looks at the queue.
SPAN = 1 << 22
#: Resident memory of the interpreter with all modules, the library, and kernels that were compiled just now, as in the
#: first merge on a machine; from the next one on their machine code is all that is loaded, for half of it.
INTERPRETER_BYTES = {"np": 230_000_000, "pt": 330_000_000, "pd": 400_000_000}
#: More of it where kernels tally, and where some compute in float64.
TALLYING_BYTES, DOUBLE_BYTES = 45_000_000, 55_000_000
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
LEAST_GPU_ROOM = 44_000_000
#: What the plan and the report remember of an output tensor, and of each of its sources.
OUTPUT_BYTES, SOURCE_BYTES = 700, 300
#: Tables of a tensor under way and of the worker that makes them, for each model.
TABLE_BYTES = 2_500_000
#: Tensors that are computed, whose parts are kept beside those of the tensors under way.
KEPT = 2


class Weight(NamedTuple):
    """What the tensors of a merge weigh.

    Attributes:
        outputs: The number of output tensors.
        sources: The number of models, the base included.
        sizes: For each kind of tensor, the number of its elements, and the bytes of one in all sources and the output.
        a_reader: Bytes that reading takes beside that, at most.
        held: Bytes that computing the sources of one tensor keeps resident, at most.
        double: Whether any is computed in float64.
    """

    outputs: int
    sources: int
    sizes: frozenset[tuple[int, int]]
    a_reader: int
    held: int
    double: bool

    def slice_bytes(self, elements: int) -> int:
        """What a worker holds of the largest slice of so many elements."""
        return max(min(elements, size) * an_element for size, an_element in self.sizes)


class Budget(NamedTuple):
    """What a merge may use.

    Attributes:
        workers: Parallel workers; fewer than asked for where the budget wants it.
        slice_elements: Elements a worker holds at a time.
        memory: The expected peak of resident memory in bytes.
        device: Where to merge, and how much of its memory each worker may fill.
    """

    workers: int
    slice_elements: int
    memory: int
    device: Device


def fit_memory(recipe: Recipe, weight: Weight) -> Budget:
    """Choose slices, and as many workers as the budget and the recipe allow, at least one.

    The memory is what the first merge on a machine may take, when the kernels are not compiled yet.

    Raises:
        MissingExtraError: If the library that ``tensor_type`` needs is not installed, or not the one for GPUs.
        RecipeError: If there is no GPU that it can use.
    """
    gpu = find_gpu(recipe.tensor_type, recipe.device, recipe.allow_cpu_fallback)
    tallies = recipe.steps[0] in ("trim", "magprune")
    tables = TABLE_BYTES * weight.sources if tallies else 0
    scratch = 0 if gpu or recipe.tensor_type == "np" else SCRATCH_BYTES
    fixed = INTERPRETER_BYTES[recipe.tensor_type] + tallies * TALLYING_BYTES + weight.double * DOUBLE_BYTES + tables
    fixed += weight.outputs * (OUTPUT_BYTES + weight.sources * SOURCE_BYTES) + gpu * GPU_BYTES
    fixed += weight.held * KEPT  # What tensors that were read last are computed from is kept too.

    def a_worker(elements: int) -> int:
        buffers = weight.slice_bytes(elements) * (PINNED_SHARE if gpu else 1)
        return buffers + weight.a_reader + weight.held + tables + scratch

    most = _most_workers(recipe, gpu)
    elements = SLICE_LARGE if weight.a_reader or weight.held or gpu else GRAIN
    while elements > GRAIN and fixed + most * a_worker(elements) > recipe.memory:
        elements //= 2
    workers = max(1, min(most, (recipe.memory - fixed) // max(a_worker(elements), 1)))
    device = Device(recipe.tensor_type, gpu, _room(recipe, gpu, workers))
    return Budget(workers, elements, fixed + workers * a_worker(elements), device)


def _most_workers(recipe: Recipe, gpu: bool) -> int:
    if not gpu:
        return recipe.n_process
    workers = max(recipe.n_process, GPU_WORKERS)
    if recipe.device == "low_gpu_mem":
        workers = min(workers, int(recipe.gpu_memory * GPU_SHARE) // LEAST_GPU_ROOM)
    return workers


def _room(recipe: Recipe, gpu: bool, workers: int) -> int:
    """Bytes of the device's memory for each worker."""
    if not gpu:
        return CPU_ROOM
    return int(recipe.gpu_memory * GPU_SHARE) // workers if recipe.device == "low_gpu_mem" else GPU_ROOM
