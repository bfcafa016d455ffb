"""Contradictions between the inputs beside the weights: configurations, tokenizers, templates, code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint
from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.config_differences import ConfigDifference, config_differences, shown
from modelfuse.errors import MismatchError
from modelfuse.planning.side_file_differences import (
    FolderFiles,
    SideFileDifference,
    processor_and_code_differences,
    serving_differences,
)
from modelfuse.recipe.recipe import Recipe


def compare_inputs(recipe: Recipe, models: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Compare the files beside the weights.

    Args:
        recipe: The settings.
        models: The models in order, then the base if there is one.

    Returns:
        Warnings, one per difference: what differs, and which model's is used.

    Raises:
        MismatchError: If the configurations give the weights different meanings, and ``allow_mismatch`` is not given.
    """
    fatal, warnings = list[str](), list[str]()
    for difference, text in _of_configs(recipe, models):
        (fatal if difference.fatal else warnings).append(text)
    if recipe.output_format != "lora":
        warnings += _of_files(recipe, models)
    if fatal and not recipe.allow_mismatch:
        raise MismatchError(
            "The models' configurations give their weights different meanings:\n"
            + "\n".join(f"  {text}" for text in fatal),
            "Merge models of one architecture, or merge these anyway with --allow_mismatch.",
        )
    return (*fatal, *warnings)


def _of_configs(recipe: Recipe, models: Sequence[Checkpoint]) -> Iterator[tuple[ConfigDifference, str]]:
    """Differences to the reference's config.json; equal differences of several models are one."""
    reference, name = models[recipe.reference], recipe.inputs[recipe.reference]
    found: dict[str, tuple[ConfigDifference, list[str]]] = {}
    for model, other in zip(models, recipe.inputs, strict=True):
        if model is reference or isinstance(model, Adapter):
            continue
        for difference in config_differences(reference.config, model.config):
            key = f"{difference.key} {shown(difference.other)}"
            found.setdefault(key, (difference, []))[1].append(str(other))
    for difference, others in found.values():
        values = f"{shown(difference.one)} in {name}, but {shown(difference.other)} in {' and '.join(others)}"
        taken = "" if difference.fatal and not recipe.allow_mismatch else f"; that of {name} is used"
        yield difference, f"{CONFIG_FILE}: {difference.key} is {values}{taken}"


def _of_files(recipe: Recipe, models: Sequence[Checkpoint]) -> Iterator[str]:
    """Differences to the files that the output gets; equal differences of several models are one."""
    folders = [FolderFiles.of(path) for path in recipe.input_paths]
    reference, name = folders[recipe.reference], recipe.inputs[recipe.reference]
    taken = reference if recipe.tokenizer_path is None else FolderFiles.of(recipe.tokenizer_path)
    tokenizer_owner = name if recipe.tokenizer_from is None else recipe.tokenizer_from
    found: dict[tuple[SideFileDifference, object], list[object]] = {}
    for other, own, model in zip(recipe.inputs, folders, models, strict=True):
        # With --tokenizer_from, the user knows that the reference's tokenizer is another one.
        if own.folder != taken.folder and (recipe.tokenizer_from is None or own is not reference):
            for difference in serving_differences(taken, own):
                found.setdefault((difference, tokenizer_owner), []).append(other)
        if own.folder != reference.folder and not isinstance(model, Adapter):
            for difference in processor_and_code_differences(reference, own):
                found.setdefault((difference, name), []).append(other)
    for (difference, owner), others in found.items():
        names = list(dict.fromkeys(map(str, others)))
        can_choose = difference.serious and owner == tokenizer_owner
        way = f" (--tokenizer_from {names[0]} would use its own)" if can_choose else ""
        yield f"{' and '.join(names)}: {difference.text}; that of {owner} is used{way}"
