"""The models that a configuration names, opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelfuse.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from modelfuse.checkpoints.adapters import Adapter, is_adapter, open_adapter
from modelfuse.checkpoints.adapters.applied import applied
from modelfuse.checkpoints.buffers import without_strays
from modelfuse.checkpoints.layer_stacks import Stack, find_stacks
from modelfuse.checkpoints.layouts.convert import bring_together
from modelfuse.checkpoints.quantization import dequantized
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS
from modelfuse.checkpoints.ties import says_tied
from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.documents import Configurations
from modelfuse.recipe.arcee.references import Reference
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage.concurrent import each_of


@dataclass(frozen=True)
class OpenModel:
    """A model of a configuration.

    Attributes:
        reference: What the configuration calls it.
        number: The number of the input that it is told of as: its own, or its adapter's.
        checkpoint: Its tensors, an adapter applied.
        adapter: The adapter, laid over the base that it changes.
        stacks: Its layers.
    """

    reference: Reference
    number: int
    checkpoint: Checkpoint
    adapter: Adapter | None
    stacks: tuple[Stack, ...]

    def find(self, name: str) -> StoredTensor | None:
        """The tensor of a name; of a head that is tied to the embedding, the embedding."""
        checkpoint = self.checkpoint
        found = checkpoint.tensors.get(checkpoint.aliases.get(name, name))
        if found is None and name.endswith(HEADS) and self.ties:
            embedding = self.embedding
            return None if embedding is None else checkpoint[embedding]
        return found

    def delta(self, name: str, base: Reference | None) -> StoredTensor | None:
        """The adapter's difference to a base, if it is one to that very base."""
        if self.adapter is None or base is None or base.lora is not None or base.model != self.reference.model:
            return None
        found = self.adapter.tensors.get(self.adapter.aliases.get(name, name))
        return found if found is not None and found.is_delta else None

    @property
    def ties(self) -> bool:
        """Whether the head is tied to the embedding, where it has none of its own."""
        return says_tied(self.checkpoint.config) is not False

    @property
    def is_tied(self) -> bool:
        """Whether its head is its embedding, stored once or twice."""
        said = says_tied(self.checkpoint.config)
        has_head = any(name.endswith(HEADS) for name in self.checkpoint)
        return said is True or (said is None and not has_head)

    @property
    def embedding(self) -> str | None:
        """The name of the embedding that a head can be tied to."""
        found = [name for name in self.checkpoint if name.endswith(EMBEDDINGS)]
        return min(found, key=len) if found else None

    def stack(self, module: str) -> Stack | None:
        """Its layers in one part of the model."""
        return next((stack for stack in self.stacks if stack.module == module), None)


def open_models(
    recipe: Recipe, configurations: Configurations
) -> tuple[tuple[Checkpoint, ...], dict[Reference, OpenModel]]:
    """Open all that the result's document names, headers only.

    Returns:
        Every input in the recipe's order, adapters over the base that they change; and the models.

    Raises:
        CheckpointError: If an input is missing, malformed, or quantized in a way that is not understood.
        MismatchError: If a model's layout cannot be known, or an adapter does not fit.
        RecipeError: If an adapter stands where a model should, or the other way round.
    """
    words = list(configurations.models)
    references = configurations.result.references
    _check_kinds(recipe, words, references)
    full = sorted({words.index(each.words[0]) for each in references})
    opened = each_of(lambda path: dequantized(open_checkpoint(path, recipe.merge_prefix)),
                     [recipe.input_paths[number] for number in full])  # fmt: skip
    paths = tuple(recipe.model_path_list[number] for number in full)
    layouts = recipe.input_layout
    if layouts is not None and len(layouts) > 1:
        layouts = tuple(layouts[number] for number in full)
    together = bring_together(tuple(opened), recipe.changed(model_path_list=paths, input_layout=layouts))
    together = without_strays(together)
    inputs: dict[int, Checkpoint] = dict(zip(full, together, strict=True))
    models = {each: _open(recipe, each, words, inputs) for each in references}
    return tuple(inputs[number] for number in range(len(words))), models


def _open(recipe: Recipe, reference: Reference, words: Sequence[str], inputs: dict[int, Checkpoint]) -> OpenModel:
    number = words.index(reference.words[0])
    checkpoint, adapter = inputs[number], None
    if reference.lora is not None:
        number = words.index(reference.words[1])
        layout = recipe.output_layout or checkpoint.layout
        paddle, strict = None if layout is None else layout == "paddle", recipe.on_nonfinite == "error"
        adapter = open_adapter(recipe.input_paths[number], checkpoint, paddle=paddle, strict=strict)
        inputs[number] = adapter
        checkpoint = applied(adapter, checkpoint)
    shapes: Mapping[str, object] = {**checkpoint.tensors, **checkpoint.aliases}
    return OpenModel(reference, number, checkpoint, adapter, find_stacks(list(shapes), checkpoint.config))


def _check_kinds(recipe: Recipe, words: Sequence[str], references: Sequence[Reference]) -> None:
    for reference in references:
        for place, word in enumerate(reference.words):
            path = recipe.input_paths[words.index(word)]
            adapts = is_adapter(path)
            if adapts and place == 0:
                raise RecipeError(f"{path} is an adapter, which changes a base", f"Write BASE+{word}.")
            if not adapts and place == 1:
                raise RecipeError(f"{path} is no adapter, but stands behind a +", "Name a folder with an adapter.")
