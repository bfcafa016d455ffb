"""How many workers and which slices keep a merge within its memory budget."""

from __future__ import annotations

from typing import NamedTuple

from modelfuse.recipe import Recipe

#: Elements of a slice: they stream best through the second-level cache. Whatever else slices could be, they start at
#: multiples of this, so that sums and checksums never depend on them.
GRAIN = 1 << 18
#: What is read in another order than it is stored in touches the same pages again for every slice: larger ones.
SLICE_TURNED = 1 << 22
#: Elements a worker walks between two looks at the queue.
SPAN = 1 << 22
#: Resident memory of the interpreter with all modules and kernels that were compiled just now, as in the first merge on
#: a machine; from the next one on they are read from a cache and take a quarter less.
INTERPRETER_BYTES = 230_000_000
#: More of it where kernels tally, and where some compute in float64.
TALLYING_BYTES, DOUBLE_BYTES = 45_000_000, 55_000_000
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
    """

    workers: int
    slice_elements: int
    memory: int


def fit_memory(recipe: Recipe, weight: Weight) -> Budget:
    """Choose slices, and as many workers as the budget and the recipe allow, at least one.

    The memory is what the first merge on a machine may take, when the kernels are not compiled yet.
    """
    tallies = recipe.steps[0] in ("trim", "magprune")
    tables = TABLE_BYTES * weight.sources if tallies else 0
    fixed = INTERPRETER_BYTES + tallies * TALLYING_BYTES + weight.double * DOUBLE_BYTES + tables
    fixed += weight.outputs * (OUTPUT_BYTES + weight.sources * SOURCE_BYTES)

    fixed += weight.held * KEPT  # What tensors that were read last are computed from is kept too.

    def a_worker(elements: int) -> int:
        return weight.slice_bytes(elements) + weight.a_reader + weight.held + tables

    elements = SLICE_TURNED if weight.a_reader or weight.held else GRAIN
    while elements > GRAIN and fixed + recipe.n_process * a_worker(elements) > recipe.memory:
        elements //= 2
    workers = max(1, min(recipe.n_process, (recipe.memory - fixed) // max(a_worker(elements), 1)))
    return Budget(workers, elements, fixed + workers * a_worker(elements))
