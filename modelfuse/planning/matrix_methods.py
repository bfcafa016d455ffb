"""The matrices of each tensor for whole-matrix methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.core_space import in_core
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.applied import Applied
from modelfuse.planning.input_grams import GivenGrams
from modelfuse.planning.operations import can_be_merged
from modelfuse.planning.whole_matrices import Cuts
from modelfuse.recipe.recipe import Recipe


class MatrixMethods:
    """Splits tensors into matrices, with Gram matrices and adapters' low-rank terms where a method can use them.

    Args:
        recipe: The settings.
        models: The models in order, then the base if there is one.

    Raises:
        CheckpointError: If a file in ``gram_list`` is missing or malformed.
        MismatchError: If a file was collected from another of the models.
    """

    def __init__(self, recipe: Recipe, models: Sequence[Checkpoint]) -> None:
        self._recipe = recipe
        self._grams = GivenGrams(recipe)
        donor = models[recipe.reference]
        self._cuts = Cuts((donor, *models), recipe.output_layout or donor.layout)

    def matrices(self, name: str, sources: Sequence[StoredTensor], method: Applied, named: bool) -> Matrices | None:
        """The matrices of a tensor; None if it is averaged instead.

        Args:
            name: Its name in the output.
            sources: The models' tensors, then the base's if there is one.
            method: Its method.
            named: Whether a rule gives this tensor its method: then embeddings, heads and routers are matrices, too.
        """
        if not can_be_merged(name, sources[-1]):
            return None
        matrices = self._cuts.of(name, sources[-1].shape, named)
        matrices = self._grams.with_grams(matrices, name, sources, method)
        if self._recipe.has_base and any(source.is_delta for source in sources):
            strict = self._recipe.on_nonfinite == "error"
            return in_core(name, sources[:-1], sources[-1], method, matrices, strict)
        return matrices

    def notes(self) -> Iterator[str]:
        """Notes on Gram matrices that are used, and on tensors that are averaged or not split.

        Raises:
            MismatchError: If Gram matrices are missing or do not fit.
        """
        self._grams.check()
        yield from self._grams.notes()
        yield from self._cuts.notes()
