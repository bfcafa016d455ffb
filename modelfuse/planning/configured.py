"""Drafts of mergekit configurations: merges and mixtures of experts."""

from __future__ import annotations

from modelfuse.planning.drafts import Draft
from modelfuse.recipe.recipe import Recipe


def configured_draft(recipe: Recipe) -> Draft:
    """The draft of the recipe's mergekit configuration.

    Raises:
        ModelfuseError: As :func:`~modelfuse.planning.plan.make_plan`.
    """
    mixture = recipe.configurations.mixture
    if mixture is not None:
        from modelfuse.planning.mixture.draft import draft_of_mixture

        return draft_of_mixture(recipe, mixture)
    from modelfuse.planning.arcee.draft import draft_of

    return draft_of(recipe)
