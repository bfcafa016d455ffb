"""What the inputs contradict each other in beside their tensors: configuration, tokenizers, templates, code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint
from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.config_differences import ConfigDifference, config_differences, shown
from modelfuse.checkpoints.served_differences import Served, ServedDifference, other_differences, served_differences
from modelfuse.errors import MismatchError
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
    for served, text in _of_files(recipe, models) if recipe.output_format != "lora" else ():
        (fatal if served.fatal else warnings).append(text)
    if fatal and not recipe.allow_mismatch:
        raise MismatchError(
            "The models contradict each other in what decides what their weights mean:\n"
            + "\n".join(f"  {text}" for text in fatal),
            "Merge models of one kind. To merge these all the same: --allow_mismatch.",
        )
    return (*fatal, *warnings)


def _of_configs(recipe: Recipe, models: Sequence[Checkpoint]) -> Iterator[tuple[ConfigDifference, str]]:
    """Differences to the reference's config.json, of several models with the same one as one."""
    last = -1 if recipe.base_model_path is not None else 0
    reference, name = models[last], recipe.inputs[last]
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


def _of_files(recipe: Recipe, models: Sequence[Checkpoint]) -> Iterator[tuple[ServedDifference, str]]:
    last = -1 if recipe.base_model_path is not None else 0
    served = [Served.of(path) for path in recipe.input_paths]
    taken = served[last] if recipe.tokenizer_path is None else Served.of(recipe.tokenizer_path)
    whose = recipe.inputs[last] if recipe.tokenizer_from is None else recipe.tokenizer_from
    folders = dict(zip(recipe.inputs, served, strict=True))
    for name, own in folders.items():
        found = [*served_differences(taken, own)] if own.folder != taken.folder else []
        for difference in found:
            yield difference, f"{name}: {difference.text}; that of {whose} is taken{_way_out(difference, str(name))}"
        if own.folder != served[last].folder and not isinstance(models[recipe.inputs.index(name)], Adapter):
            for difference in other_differences(served[last], own):
                yield difference, f"{name}: {difference.text}; that of {recipe.inputs[last]} is taken"


def _way_out(difference: ServedDifference, name: str) -> str:
    return f" (--tokenizer_from {name} takes this one's)" if difference.loud else ""
