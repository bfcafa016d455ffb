"""How many workers and which slices keep a merge within its memory budget."""

from __future__ import annotations

from typing import NamedTuple

from modelfuse.kernels.choice import CPU_ROOM, GPU_ROOM, Device, find_gpu
from modelfuse.recipe import Recipe

#: Slices start at multiples of this many elements, so that sums and checksums never depend on them.
GRAIN = 1 << 18
#: What lies in order streams best through the second-level cache. What is read in another order than it is stored in
#: touches the same pages again for every slice, and a GPU is told what to do for every slice.
SLICE = GRAIN
SLICE_LARGE = 1 << 22
#: Elements a worker walks between two looks at the queue.
SPAN = 1 << 22
#: Resident memory of the interpreter with all modules and compiled kernels or the library, measured.
INTERPRETER_BYTES = {"np": 190_000_000, "pt": 260_000_000, "pd": 360_000_000}
#: A worker's tensors on the CPU, with what the allocator keeps of those that were freed, measured.
SCRATCH_BYTES = int(1.75 * CPU_ROOM)
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
#: Tables of a tensor under way and of the worker that makes them, for each model.
TABLE_BYTES = 3_000_000


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


def fit_memory(recipe: Recipe, an_element: float, sources: int, held: int = 0) -> Budget:
    """Choose workers and slice so that the budget holds; at least one worker with the smallest slice.

    Args:
        recipe: The settings.
        an_element: Bytes of one element in all sources and the output.
        sources: The number of models, the base included.
        held: Bytes that a worker holds beside its slices.

    Raises:
        MissingExtraError: If the library that ``tensor_type`` needs is not installed, or not the one for GPUs.
        RecipeError: If there is no GPU that it can use.
    """
    gpu = find_gpu(recipe.tensor_type, recipe.device, recipe.allow_cpu_fallback)
    sparsify_type, _ = recipe.steps
    tables = TABLE_BYTES * sources if sparsify_type in ("trim", "magprune") else 0
    largest = recipe.max_tensor_mem * 2**30 / an_element
    workers = _most_workers(recipe, gpu)
    elements = SLICE_LARGE if held or gpu else SLICE
    interpreter = INTERPRETER_BYTES[recipe.tensor_type] + (GPU_BYTES if gpu else 0)
    scratch = 0 if gpu or recipe.tensor_type == "np" else SCRATCH_BYTES

    def peak() -> int:
        buffers = elements * an_element * (PINNED_SHARE if gpu else 1)
        return interpreter + tables + int(workers * (buffers + tables + held + scratch))

    while elements > GRAIN and (elements > largest or peak() > recipe.memory):
        elements //= 2
    while workers > 1 and peak() > recipe.memory:
        workers -= 1
    return Budget(workers, elements, peak(), Device(recipe.tensor_type, gpu, _room(recipe, gpu, workers)))


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
