"""All methods by name. A method's own file declares it; this is the only other place that knows it.

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
    ram,
    random_keep,
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

#: The files of methods, in the order in which help lists them.
MODULES = (
    linear, slerp, nuslerp, multislerp, karcher, trim, magprune, dare, breadcrumbs, model_stock, nearswap, arcee_fusion,
    sce, ram, iso_c, iso_cts, tsv_m, ridge, swudi,
)  # fmt: skip
#: Steps that flat recipes have no name for: configurations mean them (:mod:`modelfuse.methods.arcee`).
UNNAMED: tuple[Sparsifier | Combination, ...] = (
    largest.LARGEST, random_keep.RANDOM, random_keep.RANDOM_BY_RANK, ties.ELECT,
)  # fmt: skip

METHODS: dict[str, Method] = {}
SPARSIFIERS: dict[str, Sparsifier] = {}
COMBINATIONS: dict[str, Combination] = {}
#: merge_method → (sparsify_type, merge_type)
MERGE_METHODS: dict[str, tuple[str | None, str]] = {}
#: Every setting of any method.
PARAMETERS: dict[str, Parameter] = {}
#: Other names of settings.
PARAMETER_ALIASES: dict[str, str] = {}


def register(method: Method) -> None:
    """Make a method known by its name, and its steps and settings with it.

    Raises:
        ValueError: If something else has one of the names already.
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
    """A pair of steps with all that they need.

    Args:
        sparsifier: Acts on each model before, if there is one.
        combination: Makes one tensor of all.
        weights: One a model.
        settings: Settings by name, a sequence where they differ by model; others have the parameters' defaults, and
            those that neither step has are left out.
        seed: The seed of all random draws.
        streams: Each model's number in the recipe; empty: in order.
        factor: What the merged difference is multiplied by.
        norm: Of methods of whole matrices, the norm of what they make, relative to that of the sum.
    """
    own: list[tuple[str, Value | tuple[Value, ...]]] = []
    for parameter in parameters_of(sparsifier, combination):
        value = settings.get(parameter.name, parameter.default)
        own.append((parameter.name, value if isinstance(value, bool | int | float | str) else tuple(value)))
    return Applied(combination, sparsifier, tuple(weights), tuple(own), seed, tuple(streams), factor, norm)


def every_chain(methods: Iterable[str], models: int) -> list[Applied]:
    """Methods with all their switches and choices: one of each chain of expressions that there is."""
    found: dict[str, Applied] = {}
    for name in methods:
        method = METHODS[name]
        static = [each for each in parameters_of(method.sparsifier, method.combination) if each.is_static]
        options: list[tuple[Value, ...]] = [each.choices or (False, True) for each in static]
        for values in product(*options):
            settings: dict[str, Value] = {each.name: value for each, value in zip(static, values, strict=True)}
            applied = apply(method.sparsifier, method.combination, (1.0,) * models, settings)
            found.setdefault(applied.chain.text, applied)
    return list(found.values())


def _register_all(methods: Iterable[Method]) -> None:
    for method in methods:
        register(method)


_register_all(method for module in MODULES for method in module.METHODS)
for step in UNNAMED:
    table: dict[str, Any] = SPARSIFIERS if isinstance(step, Sparsifier) else COMBINATIONS
    table[step.name] = step
#: What makes one tensor of itself.
TAKE = apply(None, linear.LINEAR, (1.0,), {})
