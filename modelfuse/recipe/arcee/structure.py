"""Check the slices of a configuration, and its models against its method."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.configuration import Configuration, Slice


def check_configuration(read: Configuration) -> None:
    """Check the slices, and the number of models.

    Raises:
        RecipeError: If a slice is invalid; names it.
    """
    if read.grammar.base == "required" and read.base_model is None:
        everywhere = chain.from_iterable(module.slices for module in read.modules.values())
        if not all(part.base_model for part in everywhere):
            raise RecipeError(f"merge_method {read.merge_method} needs base_model", "Name the model to compare with.")
    for where, part in _slices(read):
        _check_ranges(part, where)
        _check_models(read, part, where)


def _slices(read: Configuration) -> Iterator[tuple[str, Slice]]:
    for name, module in read.modules.items():
        prefix = "" if read.applies_to_all else f"modules.{name}."
        for number, part in enumerate(module.slices):
            whole = part.sources[0].layers is None
            yield f"{prefix}models" if whole else f"{prefix}slices[{number}]", part


def _check_ranges(part: Slice, where: str) -> None:
    lengths = {source.layers[1] - source.layers[0] for source in part.sources if source.layers is not None}
    if len(lengths) > 1:
        ranges = ", ".join(f"{list(source.layers or ())} of {source.model}" for source in part.sources)
        raise RecipeError(f"{where} has ranges of different lengths: {ranges}", "Take as many layers of each model.")
    models = [source.model for source in part.sources]
    if twice := [model for number, model in enumerate(models) if model in models[:number]]:
        raise RecipeError(f"{where} has the model {twice[0]} twice", "Name it once, with the sum of its weights.")


def _check_models(read: Configuration, part: Slice, where: str) -> None:
    grammar, base = read.grammar, read.base_of(part)
    models = [source.model for source in part.sources]
    has_base = base is not None and base in models
    if base is not None and not has_base and grammar.base != "ignored":
        raise RecipeError(f"{where} does not have the base model {base}", "Add it to the sources of every slice.")
    count = len(models) - (has_base and grammar.base != "ignored" and not grammar.counts_base)
    fewest, most = grammar.models
    if fewest <= count and (most is None or count <= most):
        return
    wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
    beside = "" if grammar.base == "ignored" or grammar.counts_base else " beside the base"
    hint = "Name as many as it takes."
    if read.merge_method == "passthrough" and has_base:
        hint = "base_model is one of its models: leave it out."
    raise RecipeError(
        f"merge_method {read.merge_method} takes {wanted} model{'s' * (fewest != 1)}{beside}, "
        f"but {where} has {count}", hint,
    )  # fmt: skip
