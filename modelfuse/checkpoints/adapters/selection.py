"""Select the modules of an adapter output, and those that are saved whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.heads import has_other_rows
from modelfuse.checkpoints.name_patterns import Patterns, UnsupportedPattern
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS, group_names
from modelfuse.errors import RecipeError
from modelfuse.recipe.recipe import Recipe

#: Matrices with a row for each token.
TOKENS = (*EMBEDDINGS, *HEADS)


@dataclass
class Selection:
    """Selects changed tensors by the recipe's settings.

    Attributes:
        recipe: The settings.
        unchosen: Tensors that ``lora_include`` and ``lora_exclude`` leave out.
        skipped: Tensors that ``lora_skip_whole`` leaves out.
        small: Tensors that change by no more than ``lora_epsilon``.

    Raises:
        RecipeError: If an expression is invalid.
    """

    recipe: Recipe
    unchosen: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._include, self._exclude = (
            _patterns(name, getattr(self.recipe, name)) for name in ("lora_include", "lora_exclude")
        )

    def takes(self, module: str, name: str) -> bool:
        """Whether a module is selected; embeddings and heads need not be included explicitly."""
        included = self._include is None or name.endswith(TOKENS) or bool(self._include.fitting(module))
        if included and (self._exclude is None or not self._exclude.fitting(module)):
            return True
        self.unchosen.append(name)
        return False

    def saves_whole(self, module: str, name: str, sources: Sequence[StoredTensor], base: StoredTensor) -> bool:
        """Whether a tensor is saved whole: because it is requested, or because it has rows that the base lacks."""
        if any(f".{module}".endswith(f".{each}") for each in self.recipe.lora_whole):
            return True
        if not name.endswith(TOKENS):
            return False
        return self.recipe.lora_embeddings == "whole" or any(has_other_rows(name, each, base) for each in sources)

    def notes(self) -> Iterator[str]:
        """Notes on what is left out, and why."""
        for why, names in (
            ("by lora_include and lora_exclude", self.unchosen), ("by lora_skip_whole", self.skipped),
            ("as it changes by no more than lora_epsilon", self.small),
        ):  # fmt: skip
            if names:
                yield f"Left out {why}: {', '.join(group_names(names))}."


def _patterns(setting: str, text: str | None) -> Patterns | None:
    if text is None:
        return None
    try:
        return Patterns([f".*({text}).*"])
    except UnsupportedPattern as error:
        raise RecipeError(f"{setting} is {text!r}: {error}", "Give a regular expression.") from None
