"""Gram matrices of the models' inputs from files, and whether they fit the tensors that are merged with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.input_grams import open_input_grams
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.errors import MismatchError
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.applied import Applied
from modelfuse.recipe.recipe import Recipe


class GivenGrams:
    """The files of a recipe, one a model.

    Args:
        recipe: The settings.

    Raises:
        CheckpointError: If a file is missing, or none that `modelfuse collect` writes.
        MismatchError: If one was made of another of the models.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._files = [open_input_grams(path) for path in recipe.gram_list]
        self._models = [each.name for each in recipe.model_path_list] if self._files else []
        self._missing: dict[int, list[str]] = {}
        self._unfit: list[str] = []
        for own, model in zip(self._files, self._models, strict=True):
            if own.model != model and own.model in self._models:
                raise MismatchError(
                    f"{own.path} was collected from {own.model}, but stands for {model}",
                    "Give gram_list in the order of model_path_list.",
                )

    def with_grams(
        self, matrices: Matrices | None, name: str, sources: Sequence[StoredTensor], method: Applied
    ) -> Matrices | None:
        """A tensor's matrices with the Gram matrices of their inputs, if its method takes some.

        Args:
            matrices: How it is cut.
            name: Its name in the output.
            sources: The models' tensors, and the base's.
            method: What merges them.
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
                self._unfit.append(f"  {name}: {own.path} has {list(gram.shape)}, its inputs take {wanted}")
            else:
                found.append(gram)
        return replace(matrices, grams=tuple(found))

    def check(self) -> None:
        """Refuse what was found missing or of another shape.

        Raises:
            MismatchError: With all of it.
        """
        lines = [
            f"  {name} in {self._files[number].path}"
            for number, names in self._missing.items()
            for name in group_names(names)
        ]
        if lines or self._unfit:
            raise MismatchError(
                "There are no Gram matrices that fit for:\n" + "\n".join([*lines, *self._unfit]),
                "Collect them of these models with `modelfuse collect`, or have a rule merge these tensors otherwise.",
            )

    def notes(self) -> Iterator[str]:
        """What is taken for which model."""
        for own, model in zip(self._files, self._models, strict=True):
            yield f"Inputs of {model}: {own.path.name}, of {own.tokens or '?'} tokens that {own.model or 'it'} read."


def _fits(gram: StoredTensor, matrices: Matrices) -> bool:
    shape = gram.shape if len(gram.shape) == 3 else (1, *gram.shape)
    return shape == (matrices.units, matrices.inputs, matrices.inputs)
