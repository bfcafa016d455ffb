"""Gram matrices of the layers' inputs, from ``gram_list``, matched to the tensors that are merged with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.input_grams import open_input_grams
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.errors import MismatchError
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.applied import Applied
from modelfuse.recipe.recipe import Recipe


class GivenGrams:
    """The Gram matrix files of a recipe, one per model.

    Args:
        recipe: The settings.

    Raises:
        CheckpointError: If a file is missing or was not written by `modelfuse collect`.
        MismatchError: If a file was collected from another of the models.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._files = [open_input_grams(path) for path in recipe.gram_list]
        self._models = [each.name for each in recipe.model_path_list] if self._files else []
        self._missing: dict[int, list[str]] = {}
        self._unfit: list[str] = []
        for own, model in zip(self._files, self._models, strict=True):
            if own.model != model and own.model in self._models:
                raise MismatchError(
                    f"{own.path} was collected from {own.model}, but gram_list gives it for {model}",
                    "Give gram_list in the order of model_path_list.",
                )

    def with_grams(
        self, matrices: Matrices | None, name: str, sources: Sequence[StoredTensor], method: Applied
    ) -> Matrices | None:
        """The matrices of a tensor with the Gram matrices of their inputs, if the method needs them.

        Args:
            matrices: How the tensor is split into matrices.
            name: Its name in the output.
            sources: The models' tensors, and the base's.
            method: Its method.
        """
        *models, base = sources
        how, changes = method.combination.matrix, any(source != base for source in models)
        if matrices is None or how is None or how.gram != "given" or not changes:
            return matrices
        found = []
        for number, (own, source) in enumerate(zip(self._files, models, strict=True)):
            gram = own.of(source.name) or own.of(name)
            if gram is None:
                self._missing.setdefault(number, []).append(name)
            elif not _fits(gram, matrices):
                wanted = [matrices.units] * (matrices.units > 1) + [matrices.inputs] * 2
                self._unfit.append(f"  {name}: {own.path} has the shape {list(gram.shape)}, needed is {wanted}")
            else:
                found.append(gram)
        return replace(matrices, grams=tuple(found))

    def check(self) -> None:
        """Check that no Gram matrix was missing or had another shape.

        Raises:
            MismatchError: Listing all of them.
        """
        lines = [
            f"  {name} in {self._files[number].path}"
            for number, names in self._missing.items()
            for name in group_names(names)
        ]
        if lines or self._unfit:
            raise MismatchError(
                "There are no fitting Gram matrices for:\n" + "\n".join([*lines, *self._unfit]),
                "Collect them from these models with `modelfuse collect`, or give these tensors another method in a "
                "rule.",
            )

    def notes(self) -> Iterator[str]:
        """The file of each model, as notes."""
        for own, model in zip(self._files, self._models, strict=True):
            yield (
                f"Gram matrices for {model}: {own.path.name}, collected from {own.model or 'it'} "
                f"over {own.tokens or '?'} tokens."
            )


def _fits(gram: StoredTensor, matrices: Matrices) -> bool:
    shape = gram.shape if len(gram.shape) == 3 else (1, *gram.shape)
    return shape == (matrices.units, matrices.inputs, matrices.inputs)
