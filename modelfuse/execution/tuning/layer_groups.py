"""Weights for groups of consecutive layers: rules for the layers of each group, with a weight for each model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from modelfuse.checkpoints.layer_stacks import Stack, find_stacks
from modelfuse.errors import RecipeError
from modelfuse.execution.tuning.search_space import Dimension, Space, weights_of
from modelfuse.execution.tuning.usual_search import WEIGHTS, factor_of, is_relative, start_weights
from modelfuse.planning.plan import Plan
from modelfuse.recipe.method_settings import FACTOR

#: Names of modules that mix tokens, as opposed to MLPs.
ATTENTION = re.compile(r"attn|attention|mixer|ssm|rwkv|^att$")
NORMS = re.compile(r"norm|^ln")
ATTENTION_PART, REST_PART = "attention", "MLP"


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """A group of layers, or their attention or MLP.

    Attributes:
        name: The group's name in tables.
        globs: Patterns of the names of its tensors.
    """

    name: str
    globs: tuple[str, ...]


def find_groups(
    names: Sequence[str], config: Mapping[str, object], count: int, attention_apart: bool
) -> tuple[LayerGroup, ...]:
    """Divide each stack of layers into groups of consecutive layers.

    >>> names = [f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in ("self_attn.q_proj", "mlp.up")]
    >>> [(group.name, group.globs) for group in find_groups(names, {}, 2, True)][0]
    ('layers 0-1 attention', ('model.layers.0.self_attn.*', 'model.layers.1.self_attn.*'))

    Args:
        names: The names of the output's tensors.
        config: The content of config.json.
        count: The number of groups per stack; fewer for stacks with fewer layers.
        attention_apart: Whether attention and MLP are groups of their own.

    Raises:
        RecipeError: If there are no layers, or fewer than ``count``.
    """
    stacks = find_stacks(names, config)
    if not stacks:
        raise RecipeError("groups is given, but no layers were found in the tensors' names",
                          "Leave groups out, or give rules with weights of their own.")  # fmt: skip
    most = max(stack.count for stack in stacks)
    if count > most:
        raise RecipeError(f"groups is {count}, but the models have {most} layers", f"Give at most {most}.")
    found = list[LayerGroup]()
    for stack in stacks:
        parts = min(count, stack.count)
        bounds = [stack.count * part // parts for part in range(parts + 1)]
        for first, end in pairwise(bounds):
            found += _groups_of(stack, range(first, end), names, attention_apart, len(stacks) > 1)
    return tuple(found)


def _groups_of(
    stack: Stack, layers: range, names: Sequence[str], attention_apart: bool, several: bool
) -> list[LayerGroup]:
    """The group of some layers of a stack or, with attention apart, two: attention, then everything."""
    stem = stack.prefix.rstrip(".") if several else stack.prefix.rstrip(".").rpartition(".")[2]
    name = f"{stem} {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{stem} {layers[0]}"
    every = LayerGroup(name, tuple(f"{_literal(stack.prefix)}{layer}.*" for layer in layers))
    if not attention_apart:
        return [every]
    heads = dict[str, None]()
    for each in names:
        if stack.layer_of(each) in layers:
            inside = each[len(stack.prefix) :].split(".")
            if len(inside) > 2 and ATTENTION.search(inside[1]) and not NORMS.search(inside[1]):
                heads[f"{_literal(stack.prefix + '.'.join(inside[:2]))}.*"] = None
    if not heads:
        return [every]
    return [LayerGroup(f"{name} {ATTENTION_PART}", tuple(heads)), LayerGroup(f"{name} {REST_PART}", every.globs)]


def grouped(space: Space, plan: Plan, count: int, attention_apart: bool) -> Space:
    """Add a dimension for the weight of each model in each group of layers, and for tensors outside of layers.

    Args:
        space: The recipe; if its weights are marked, their range is used for each group.
        plan: The plan of the first trial.
        count: The number of groups of layers.
        attention_apart: Whether attention and MLP are groups of their own.

    Raises:
        RecipeError: If the method has no weights, or the recipe is a mergekit configuration.
    """
    recipe = plan.recipe
    if recipe.mergekit is not None:
        raise RecipeError("groups cannot be used with a mergekit configuration",
                          "Mark numbers in it instead: weight: {tune: [0, 1]}, in slices or with filters.")  # fmt: skip
    if not recipe.parameters.has_weights:
        raise RecipeError(f"groups have weights, but {recipe.parameters.name} takes none",
                          "Leave groups out, or use another method.")  # fmt: skip
    marked = space.tree.get("weight_list")
    start, (low, high) = start_weights(recipe), WEIGHTS
    if isinstance(marked, list) and all(isinstance(each, Dimension) for each in marked):
        start, low, high = [each.start for each in marked], marked[0].low, marked[0].high
    tree = dict(space.tree)
    rules = [*own] if isinstance(own := tree.get("rules"), list | tuple) else []
    names = [each.name for each in plan.tensors]
    for group in find_groups(names, plan.reference.config, count, attention_apart):
        weights = weights_of(f"{group.name} weight", len(start), low, high, start)
        rules += [{"tensors": glob, "weight_list": weights} for glob in group.globs]
    tree["rules"] = rules
    inside = [re.compile(fnmatch.translate(str(rule["tensors"]))).match for rule in rules if isinstance(rule, Mapping)]
    is_alone = any(not any(matches(name) for matches in inside) for name in names)
    tree["weight_list"] = weights_of("other weight", len(start), low, high, start) if is_alone else start
    tree["normalize"] = tree.get("normalize", is_relative(recipe))
    if recipe.has_base and is_relative(recipe) and FACTOR not in tree:
        tree[FACTOR] = factor_of(recipe)
    return replace(space, tree=tree)


def _literal(text: str) -> str:
    """A glob that matches a text as it is."""
    return re.sub(r"([*?[])", r"[\1]", text)
