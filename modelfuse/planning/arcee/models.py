"""Open the models of a mergekit configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from modelfuse.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from modelfuse.checkpoints.adapters import Adapter, is_adapter, open_adapter
from modelfuse.checkpoints.adapters.applied import applied
from modelfuse.checkpoints.buffers import without_strays
from modelfuse.checkpoints.layer_stacks import Stack, find_stacks
from modelfuse.checkpoints.layouts.convert import bring_together
from modelfuse.checkpoints.quantization import dequantized
from modelfuse.checkpoints.tensor_names import HEADS
from modelfuse.checkpoints.ties import says_tied
from modelfuse.checkpoints.vocabulary.token_rows import embedding_of
from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.configuration import Configuration
from modelfuse.recipe.arcee.mixture import Mixture
from modelfuse.recipe.arcee.references import Reference, Stage, Weights
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, folder_of
from modelfuse.storage.concurrent import each_of


@dataclass(frozen=True)
class OpenModel:
    """An open model of a configuration.

    Attributes:
        reference: Its name in the configuration.
        number: The index of its input; of its adapter's, if it has one.
        checkpoint: Its tensors, with the adapter applied.
        adapter: The adapter, opened over the model.
        stacks: Its stacks of layers.
        made: For the result of another document, names and contents of its files.
    """

    reference: Reference
    number: int
    checkpoint: Checkpoint
    adapter: Adapter | None
    stacks: tuple[Stack, ...]
    made: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def folder(self) -> PathOrUrl:
        """The folder of its other files."""
        return folder_of(self.checkpoint.path)

    def find(self, name: str) -> StoredTensor | None:
        """The tensor of a name; for a head that is tied to the embedding, the embedding. None if there is none."""
        found = self.checkpoint.find(name)
        if found is None and name.endswith(HEADS) and self.ties:
            embedding = self.embedding
            return None if embedding is None else self.checkpoint[embedding]
        return found

    def delta(self, name: str, base: Reference | None) -> StoredTensor | None:
        """The adapter's difference for a tensor, if ``base`` is the model that the adapter changes; else None."""
        if self.adapter is None or base is None or base.lora is not None or base.model != self.reference.model:
            return None
        found = self.adapter.find(name)
        return found if found is not None and found.is_delta else None

    @property
    def ties(self) -> bool:
        """Whether a head that is not stored is tied to the embedding."""
        return says_tied(self.checkpoint.config) is not False

    @property
    def is_tied(self) -> bool:
        """Whether its head is tied to its embedding, stored once or twice."""
        said = says_tied(self.checkpoint.config)
        has_head = any(name.endswith(HEADS) for name in self.checkpoint)
        return said is True or (said is None and not has_head)

    @property
    def embedding(self) -> str | None:
        """The name of the embedding that the head can be tied to."""
        return embedding_of(self.checkpoint)

    def stack(self, module: str) -> Stack | None:
        """Its layers in one module of the configuration."""
        return next((stack for stack in self.stacks if stack.module == module), None)


@dataclass
class Inputs:
    """The open inputs of all documents, and the results of earlier documents.

    Args:
        recipe: The settings.
        stages: The results of earlier documents by name.
    """

    recipe: Recipe
    stages: dict[str, OpenModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open the full models, headers only.

        Raises:
            CheckpointError: If an input is missing, malformed, or quantized by an unsupported method.
            MismatchError: If a model's layout cannot be detected.
            RecipeError: If an adapter is given instead of a model, or a model instead of an adapter.
        """
        recipe, configurations = self.recipe, self.recipe.configurations
        self._known = list(configurations.models.values())
        references = configurations.references
        _check_kinds(recipe, self._known, references)
        models = {self._number(each.model) for each in references if not isinstance(each.model, Stage)}
        full = sorted(models or {0})
        opened = each_of(lambda path: dequantized(open_checkpoint(path, recipe.merge_prefix)),
                         [recipe.input_paths[number] for number in full])  # fmt: skip
        paths, layouts = tuple(recipe.model_path_list[number] for number in full), recipe.input_layout
        if layouts is not None and len(layouts) > 1:
            layouts = tuple(layouts[number] for number in full)
        together = bring_together(tuple(opened), recipe.changed(model_path_list=paths, input_layout=layouts))
        self._opened: dict[int, Checkpoint] = dict(zip(full, without_strays(together), strict=True))

    def _number(self, weights: Weights) -> int:
        return self._known.index(weights)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All inputs in the recipe's order, adapters opened over a base."""
        for number, path in enumerate(self.recipe.input_paths):
            if number not in self._opened:  # An adapter that only unused documents name.
                self._opened[number] = open_adapter(path, self._opened[min(self._opened)])
        return tuple(self._opened[number] for number in range(len(self._known)))

    def models_of(self, document: Configuration | Mixture) -> dict[Reference, OpenModel]:
        """The models of a document.

        Raises:
            MismatchError: If an adapter does not fit its model.
        """
        return {each: self._open(each) for each in document.references}

    def _open(self, reference: Reference) -> OpenModel:
        recipe = self.recipe
        if isinstance(reference.model, Stage):
            found = replace(self.stages[reference.model.name], reference=reference)
        else:
            number = self._number(reference.model)
            found = _opened(reference, number, self._opened[number])
        if reference.lora is None:
            return found
        number, base = self._number(reference.lora), found.checkpoint
        layout = recipe.output_layout or base.layout
        paddle, strict = None if layout is None else layout == "paddle", recipe.on_nonfinite == "error"
        adapter = open_adapter(recipe.input_paths[number], base, paddle=paddle, strict=strict)
        self._opened[number] = adapter
        return replace(found, number=number, checkpoint=applied(adapter, base), adapter=adapter)


def _opened(reference: Reference, number: int, checkpoint: Checkpoint) -> OpenModel:
    return OpenModel(reference, number, checkpoint, None, stacks_of(checkpoint))


def stacks_of(checkpoint: Checkpoint) -> tuple[Stack, ...]:
    """The stacks of layers of a model."""
    return find_stacks([*checkpoint.tensors, *checkpoint.aliases], checkpoint.config)


def _check_kinds(recipe: Recipe, known: Sequence[Weights], references: Sequence[Reference]) -> None:
    for reference in references:
        for place, (part, word) in enumerate(zip(reference.parts, reference.words, strict=True)):
            if isinstance(part, Stage):
                continue
            path = recipe.input_paths[known.index(part)]
            adapts = is_adapter(path)
            if adapts and place == 0:
                raise RecipeError(f"{path} is an adapter; it needs a model before a +", f"Write MODEL+{word}.")
            if not adapts and place == 1:
                raise RecipeError(f"{path} is given after a +, but is not an adapter", "Give a folder with an adapter.")
