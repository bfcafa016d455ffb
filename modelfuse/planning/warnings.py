"""Warnings and notes of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.buffers import STRAY
from modelfuse.checkpoints.side_files import SideFile
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.checkpoints.ties import TIES
from modelfuse.planning.matching import Tied
from modelfuse.planning.memory_budget import Budget
from modelfuse.planning.output_format import OutputFormat
from modelfuse.recipe.recipe import Recipe
from modelfuse.recipe.sizes import size


def warnings_of(recipe: Recipe) -> tuple[str, ...]:
    """Warnings about settings that are valid but rarely intended, from the recipe alone."""
    if recipe.has_base:
        return ()
    # For each sparsifier, the first rule that uses it.
    drops = {recipe.parameters.steps[0]: ""}
    for number, rule in enumerate(recipe.rules, 1):
        if rule.take is None:
            drops.setdefault(recipe.parameters_of(rule).steps[0], f"Rule {number} ({rule.tensors!r}): ")
    return tuple(
        f"{where}{sparsify_type} without base_model_path drops parts of the models' weights themselves, not of what "
        "fine-tuning changed. That breaks models: in the demo, with the default reserve_p, every such merge is worse "
        "than the untouched base in all domains. Give the model that they were fine-tuned from as base_model_path."
        for sparsify_type, where in drops.items()
        if sparsify_type is not None
    )


def notes_on(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    tied: Sequence[Tied],
    form: OutputFormat,
    budget: Budget,
    side_files: Sequence[SideFile],
) -> tuple[str, ...]:
    """Notes on unusual properties of a merge, after the warnings of :func:`warnings_of`.

    Args:
        recipe: The settings.
        models: The models in order, then the base if there is one.
        tied: Names that are left out because they are tied.
        form: The output's format.
        budget: Workers and expected memory.
        side_files: The files that are copied.
    """
    reference = models[recipe.reference]
    memory = budget.memory
    notes = [*warnings_of(recipe), *(_of_dequantized(model) for model in models if model.dequantized)]
    notes += [text for model in models for text in _of_strays(model)]
    if recipe.device != "cpu" and not budget.device.gpu:
        notes.append("No usable GPU was found, so the merge runs on the CPU, as allow_cpu_fallback allows.")
    if recipe.engine == "ray":
        notes.append("With Ray, each CPU of the cluster runs one worker; n_process has no effect.")
    elif recipe.n_process is not None and budget.workers < recipe.n_process:
        notes.append(f"{budget.workers} of {recipe.n_process} workers, to stay within the memory budget.")
    if memory > recipe.memory:
        notes.append(
            f"Peak memory will be about {size(memory)}, more than the budget of {size(recipe.memory)}: one worker "
            "needs that much."
        )
    if not reference.config and not form.whole:
        notes.append(f"{reference.path} has no config.json, so the output has none; a server will need one.")
    if unmerged := [file.name for file in side_files if file.holds_weights]:
        notes.append(f"Copied from {reference.path}, not merged: the weights in {', '.join(unmerged)}.")
    notes += _of_heads(reference)
    notes += [f"{model.path}: {text}." for model in models for text in model.renamed]
    return (*notes, *form.notes(models), *_of_ties(models, tied))


def _of_dequantized(model: Checkpoint) -> str:
    number = sum(tensor.natural is not tensor.dtype for tensor in model.values())
    scales = sum(reason != STRAY for reason in model.left_out.values())
    return f"{model.path}: {number} tensors are dequantized; {scales} scale tensors are left out."


def _of_strays(model: Checkpoint) -> Iterator[str]:
    if strays := [name for name, reason in model.left_out.items() if reason == STRAY]:
        yield f"{model.path}: left out, as {STRAY}: {', '.join(group_names(strays))}."


def _of_heads(reference: Checkpoint) -> Iterator[str]:
    """Notes on heads that are tied, or not, in contradiction to the reference's config.json."""
    ties = reference.config_changes.get(TIES)
    if ties is False:
        yield f"In some models the head differs from the embedding: the output has both, and {TIES} is false."
    elif ties is True:
        yield f"In all models the head equals the embedding: the output has one tensor for both, and {TIES} is true."


def _of_ties(models: Sequence[Checkpoint], tied: Sequence[Tied]) -> Iterator[str]:
    """Notes on adapters that change one of two tied tensors: both change, as they stay tied."""
    pairs = [pair for each in tied for pair in ((each.name, each.other), (each.other, each.name))]
    for model in models:
        if isinstance(model, Adapter):
            for one, other in pairs:
                if one in model.changed:
                    yield f"{model.path} changes {one}, to which {other} is tied: both change, as with PEFT."
