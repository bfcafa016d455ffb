"""What the inputs contradict each other in beside their tensors: configuration, tokenizers, templates, code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint
from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.config_differences import ConfigDifference, config_differences, shown
from modelfuse.errors import MismatchError
from modelfuse.planning.served_differences import Served, ServedDifference, other_differences, served_differences
from modelfuse.recipe.recipe import Recipe


def compare_inputs(recipe: Recipe, models: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Compare everything beside the weights.

    Args:
        recipe: The settings.
        models: The models in order, then the base if there is one.

    Returns:
        What the user should look at, a sentence each, with whose is taken.

    Raises:
        MismatchError: If a merge of such models means nothing, and ``allow_mismatch`` is not given.
    """
    fatal, warnings = list[str](), list[str]()
    for difference, text in _of_configs(recipe, models):
        (fatal if difference.fatal else warnings).append(text)
    if recipe.output_format != "lora":
        warnings += _of_files(recipe, models)
    if fatal and not recipe.allow_mismatch:
        raise MismatchError(
            "The models contradict each other in what decides what their weights mean:\n"
            + "\n".join(f"  {text}" for text in fatal),
            "Merge models of one kind. To merge these all the same: --allow_mismatch.",
        )
    return (*fatal, *warnings)


def _of_configs(recipe: Recipe, models: Sequence[Checkpoint]) -> Iterator[tuple[ConfigDifference, str]]:
    """Differences to the reference's config.json, of several models with the same one as one."""
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
        taken = "" if difference.fatal and not recipe.allow_mismatch else f"; that of {name} is taken"
        yield difference, f"{CONFIG_FILE}: {difference.key} is {values}{taken}"


def _of_files(recipe: Recipe, models: Sequence[Checkpoint]) -> Iterator[str]:
    """Differences to the files that the output gets, of several models with the same one as one."""
    served = [Served.of(path) for path in recipe.input_paths]
    reference, name = served[recipe.reference], recipe.inputs[recipe.reference]
    taken = reference if recipe.tokenizer_path is None else Served.of(recipe.tokenizer_path)
    whose = name if recipe.tokenizer_from is None else recipe.tokenizer_from
    found: dict[tuple[ServedDifference, object], list[object]] = {}
    for other, own, model in zip(recipe.inputs, served, models, strict=True):
        # Whoever chooses a tokenizer knows that it is not the base's.
        if own.folder != taken.folder and (recipe.tokenizer_from is None or own is not reference):
            for difference in served_differences(taken, own):
                found.setdefault((difference, whose), []).append(other)
        if own.folder != reference.folder and not isinstance(model, Adapter):
            for difference in other_differences(reference, own):
                found.setdefault((difference, name), []).append(other)
    for (difference, owner), others in found.items():
        names = list(dict.fromkeys(map(str, others)))
        way = f" (--tokenizer_from {names[0]} takes its own)" if difference.loud and owner == whose else ""
        yield f"{' and '.join(names)}: {difference.text}; what {owner} has is taken{way}"
