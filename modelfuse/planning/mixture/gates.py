"""The routers of a mixture: one row for each expert, by the configuration's gate mode."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Recent
from modelfuse.dtypes import F32
from modelfuse.errors import MismatchError, RecipeError
from modelfuse.planning.arcee.models import OpenModel
from modelfuse.planning.arcee.vocabulary import folder_of
from modelfuse.planning.mixture.hidden import TOLERANCE, HiddenRows, PromptStates, prompt_states
from modelfuse.planning.mixture.prompts import PromptReader
from modelfuse.planning.mixture.tensors import EmbeddedPrompts, MadeTensor, Maker, Prompts, RandomRows
from modelfuse.recipe.arcee.mixture import HIDDEN, RANDOM, Expert, Mixture
from modelfuse.recipe.recipe import Recipe


@dataclass
class Gates:
    """Makes the routers' weights.

    Args:
        recipe: The settings beside the configuration.
        mixture: The configuration.
        base: The model whose prompts' states are taken.
        embedding: Its embedding.

    Raises:
        CheckpointError: If prompts cannot be read.
        MissingExtraError: If a library is not installed.
        RecipeError: If the engine cannot do it, or prompts are all alike.
    """

    recipe: Recipe
    mixture: Mixture
    base: OpenModel
    embedding: StoredTensor
    _states: PromptStates | None = field(default=None, init=False)
    _recent: Recent = field(default_factory=lambda: Recent(4), init=False)

    def __post_init__(self) -> None:
        mode, experts = self.mixture.gate_mode, (*self.mixture.experts, *self.mixture.shared)
        self._prompts: Prompts = ()
        if mode in RANDOM:
            return
        _check_prompts(self.mixture, self.recipe.allow_mismatch)
        if mode in HIDDEN and self.recipe.engine == "ray":
            raise RecipeError(f"gate_mode {mode} runs the base, which engine ray does not", "Use --engine local.")
        rows = self.embedding.shape[0]
        self._prompts = PromptReader(folder_of(self.base), rows, mode).tokens(experts)
        if mode in HIDDEN:
            self._states = prompt_states(self.base.checkpoint, folder_of(self.base), self._prompts, mode)

    def router(self, name: str, layer: int) -> StoredTensor:
        """The weights by which a layer chooses among the experts."""
        return self._rows(name, layer, 0, len(self.mixture.experts))

    def shared(self, name: str, layer: int) -> StoredTensor:
        """The weights by which a layer scales its shared expert."""
        first = len(self.mixture.experts)
        if self.mixture.gate_mode not in RANDOM and not self.mixture.shared[0].prompts:
            raise RecipeError(
                "shared_experts[0] has no positive_prompts, of which its gate is made",
                f"Give texts that are to go through it; gate_mode is {self.mixture.gate_mode}.",
            )
        return self._rows(name, layer, first, 1)

    def _rows(self, name: str, layer: int, first: int, count: int) -> StoredTensor:
        shape, mode = (count, self.embedding.shape[1]), self.mixture.gate_mode
        if self._states is not None:
            return self._made(name, shape, HiddenRows(self._states, layer, first, count))
        if mode in RANDOM:
            return self._made(name, shape, RandomRows(self.recipe.seed, name, shape, mode == "uniform_random"))
        return self._made(name, shape, EmbeddedPrompts(self.embedding, self._prompts[first : first + count]))

    def _made(self, name: str, shape: tuple[int, int], make: Maker) -> StoredTensor:
        needed, error = (0, None) if self._states is None else (self._states.needed, TOLERANCE)
        return MadeTensor(
            name, F32, shape, self.embedding.file, self.embedding.offset, make, self.mixture.gate_mode, needed, error,
            self._recent,
        )  # fmt: skip


def _check_prompts(mixture: Mixture, allowed: bool) -> None:
    """Refuse experts that the router cannot tell apart, or that are all the same."""
    kinds = {(each.model, each.scale) for each in mixture.experts if not each.noise}
    if len(kinds) == 1 < len(mixture.experts) and not any(each.noise for each in mixture.experts) and not allowed:
        raise MismatchError(
            f"All experts are {mixture.experts[0].model}: whichever are chosen, they compute the same",
            "Name several models; or gate_mode: random, or --allow_mismatch, for a model that is to be trained.",
        )
    seen = dict[object, int]()
    for number, each in enumerate(mixture.experts):
        key = _prompts_of(each)
        if key in seen and not allowed:
            raise MismatchError(
                f"experts[{seen[key]}] and experts[{number}] have the same prompts: the router cannot tell them apart",
                "Give each its own, or gate_mode: random for a model that is to be trained. "
                "To make it all the same: --allow_mismatch.",
            )
        seen[key] = number


def _prompts_of(expert: Expert) -> object:
    return frozenset(expert.prompts), frozenset(expert.negative)
