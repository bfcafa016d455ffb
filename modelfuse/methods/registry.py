"""The registry of methods. Apart from a method's own file, only this module refers to it.

A merge of one tensor has two steps. The *sparsifier* acts on each model alone, then the *combination* makes one
tensor of all. ``METHODS`` gives pairs of them their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from modelfuse.methods import (
    arcee_fusion,
    breadcrumbs,
    dare,
    iso_c,
    iso_cts,
    karcher,
    largest,
    linear,
    magprune,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    pcb,
    ram,
    random_keep,
    regmean,
    ridge,
    sce,
    slerp,
    swudi,
    ties,
    trim,
    tsv_m,
)
from modelfuse.methods.applied import Applied
from modelfuse.methods.spec import Combination, Method, Parameter, Sparsifier, Value

#: The modules of methods, in the order of the help.
MODULES = (
    linear, slerp, nuslerp, multislerp, karcher, trim, magprune, dare, breadcrumbs, model_stock, nearswap, arcee_fusion,
    sce, ram, pcb, iso_c, iso_cts, tsv_m, ridge, swudi, regmean,
)  # fmt: skip
#: Steps without a name in flat recipes, used by mergekit configurations (:mod:`modelfuse.methods.arcee`).
UNNAMED: tuple[Sparsifier | Combination, ...] = (
    largest.LARGEST, random_keep.RANDOM, random_keep.RANDOM_BY_RANK, ties.ELECT,
)  # fmt: skip

METHODS: dict[str, Method] = {}
SPARSIFIERS: dict[str, Sparsifier] = {}
COMBINATIONS: dict[str, Combination] = {}
#: merge_method → (sparsify_type, merge_type)
MERGE_METHODS: dict[str, tuple[str | None, str]] = {}
#: All settings of all methods, by name.
PARAMETERS: dict[str, Parameter] = {}
#: Aliases of settings.
PARAMETER_ALIASES: dict[str, str] = {}


def register(method: Method) -> None:
    """Register a method with its steps and settings.

    Raises:
        ValueError: If one of the names is already taken.
    """
    parts: list[tuple[dict[str, Any], str, Any]] = [
        (METHODS, method.name, method),
        (MERGE_METHODS, method.name, method.steps),
        (COMBINATIONS, method.combination.name, method.combination),
    ]
    if method.sparsifier is not None:
        parts.append((SPARSIFIERS, method.sparsifier.name, method.sparsifier))
    for parameter in parameters_of(method.sparsifier, method.combination):
        parts.append((PARAMETERS, parameter.name, parameter))
        parts += [(PARAMETER_ALIASES, alias, parameter.name) for alias in parameter.aliases]
    for table, name, value in parts:
        if table.get(name, value) != value:
            raise ValueError(f"{name} is declared twice")
    for table, name, value in parts:
        table[name] = value


def parameters_of(sparsifier: Sparsifier | None, combination: Combination) -> tuple[Parameter, ...]:
    """The settings of both steps, each once."""
    own = sparsifier.parameters if sparsifier else ()
    return tuple(dict.fromkeys((*own, *combination.parameters)))


def apply(
    sparsifier: Sparsifier | None,
    combination: Combination,
    weights: Sequence[float],
    settings: Mapping[str, Value | Sequence[Value]],
    *,
    seed: int = 0,
    streams: Sequence[int] = (),
    factor: float = 1.0,
    norm: float | None = None,
) -> Applied:
    """Bind a sparsifier and a combination to their settings.

    Args:
        sparsifier: Acts on each model first; None: there is none.
        combination: Combines the models' tensors.
        weights: One weight per model.
        settings: Settings by name, a sequence for those that differ by model. Missing ones get their defaults; those
            that neither step has are ignored.
        seed: The seed of all random draws.
        streams: Each model's index in the recipe; empty: in order.
        factor: Multiplies the merged difference.
        norm: For whole-matrix methods: the norm of the result relative to that of the sum.
    """
    own: list[tuple[str, Value | tuple[Value, ...]]] = []
    for parameter in parameters_of(sparsifier, combination):
        value = settings.get(parameter.name, parameter.default)
        own.append((parameter.name, value if isinstance(value, bool | int | float | str) else tuple(value)))
    return Applied(combination, sparsifier, tuple(weights), tuple(own), seed, tuple(streams), factor, norm)


def every_chain(methods: Iterable[str], models: int) -> list[Applied]:
    """Methods with all combinations of their switches and choices: one for each distinct set of expressions."""
    found: dict[object, Applied] = {}
    for name in methods:
        method = METHODS[name]
        parameters = parameters_of(method.sparsifier, method.combination)
        for values in product(*map(_options, parameters)):
            settings = {each.name: value for each, value in zip(parameters, values, strict=True)}
            applied = apply(method.sparsifier, method.combination, (1.0,) * models, settings)
            found.setdefault((applied.chain.text, *map(id, applied.merged_measures)), applied)
    return list(found.values())


def _options(parameter: Parameter) -> tuple[Value, ...]:
    """The values that kernels may depend on; a number at the end of its range may switch a measure off."""
    if parameter.is_static:
        return parameter.choices or (False, True)
    default = parameter.default
    return (
        (default, default / 2) if isinstance(default, float) and parameter.bounds.get("le") == default else (default,)
    )


def _register_all(methods: Iterable[Method]) -> None:
    for method in methods:
        register(method)


_register_all(method for module in MODULES for method in module.METHODS)
for step in UNNAMED:
    table: dict[str, Any] = SPARSIFIERS if isinstance(step, Sparsifier) else COMBINATIONS
    table[step.name] = step
#: The method that copies a single tensor.
TAKE = apply(None, linear.LINEAR, (1.0,), {})
