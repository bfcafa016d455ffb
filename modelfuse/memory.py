"""How many workers and which slices keep a merge within its memory budget."""

from __future__ import annotations

from typing import NamedTuple

from modelfuse.recipe import Recipe

#: Slices start at multiples of this many elements, so that sums and checksums never depend on them.
GRAIN = 1 << 18
#: What lies in order streams best through the second-level cache. What is read in another order than it is stored in
#: touches the same pages again for every slice.
SLICE = GRAIN
SLICE_TURNED = 1 << 22
#: Elements a worker walks between two looks at the queue.
SPAN = 1 << 22
#: Resident memory of the interpreter with all modules and compiled kernels, measured.
INTERPRETER_BYTES = 190_000_000
#: Tables of a tensor under way and of the worker that makes them, for each model.
TABLE_BYTES = 3_000_000
#: Tensors that are computed, whose parts are kept beside those of the tensors under way.
KEPT = 2


class Budget(NamedTuple):
    """What a merge may use.

    Attributes:
        workers: Parallel workers; fewer than asked for where the budget wants it.
        slice_elements: Elements a worker holds at a time.
        memory: The expected peak of resident memory in bytes.
    """

    workers: int
    slice_elements: int
    memory: int


def fit_memory(recipe: Recipe, an_element: float, sources: int, held: int = 0) -> Budget:
    """Choose workers and slice so that the budget holds; at least one worker with the smallest slice.

    Args:
        recipe: The settings.
        an_element: Bytes of one element in all sources and the output.
        sources: The number of models, the base included.
        held: Bytes that reading the sources of one tensor keeps resident beside its slices.
    """
    sparsify_type, _ = recipe.steps
    tables = TABLE_BYTES * sources if sparsify_type in ("trim", "magprune") else 0
    largest = recipe.max_tensor_mem * 2**30 / an_element
    workers = recipe.n_process
    elements = SLICE_TURNED if held else SLICE

    def peak() -> int:
        # What tensors that were read last are computed from is kept too.
        computed = held * (workers + KEPT) if held else 0
        return INTERPRETER_BYTES + tables + computed + int(workers * (elements * an_element + tables))

    while elements > GRAIN and (elements > largest or peak() > recipe.memory):
        elements //= 2
    while workers > 1 and peak() > recipe.memory:
        workers -= 1
    return Budget(workers, elements, peak())
