"""The router weights of a mixture, by the configuration's gate mode."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Recent
from modelfuse.dtypes import F32
from modelfuse.errors import MismatchError, RecipeError
from modelfuse.planning.arcee.models import OpenModel
from modelfuse.planning.mixture.hidden import TOLERANCE, HiddenRows, PromptStates, prompt_states
from modelfuse.planning.mixture.prompts import PromptReader
from modelfuse.planning.mixture.tensors import EmbeddedPrompts, MadeTensor, Prompts, RandomRows, ValueFunction
from modelfuse.recipe.arcee.mixture import HIDDEN, RANDOM, Expert, Mixture
from modelfuse.recipe.recipe import Recipe


@dataclass
class Gates:
    """Makes the weights of routers and of shared experts' gates, as computed tensors.

    Args:
        recipe: The other settings.
        mixture: The mergekit-moe configuration.
        base: The base, which computes the states of prompts.
        embedding: Its token embedding, of shape [tokens, width].

    Raises:
        CheckpointError: If prompts cannot be read.
        MissingExtraError: If a library is not installed.
        MismatchError: If experts or their prompts are the same.
        RecipeError: If the gate mode runs the base and the engine is Ray.
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
            raise RecipeError(f"gate_mode {mode} runs the base, which --engine ray cannot do", "Use --engine local.")
        rows = self.embedding.shape[0]
        self._prompts = PromptReader(self.base.folder, rows, mode).tokens(experts)
        if mode in HIDDEN:
            self._states = prompt_states(self.base.checkpoint, self.base.folder, self._prompts, mode)

    def router(self, name: str, layer: int) -> StoredTensor:
        """The router of a layer: float32, of shape [experts, width]."""
        return self._rows(name, layer, 0, len(self.mixture.experts))

    def shared(self, name: str, layer: int) -> StoredTensor:
        """The gate of a layer's shared expert: float32, of shape [1, width]."""
        first = len(self.mixture.experts)
        if self.mixture.gate_mode not in RANDOM and not self.mixture.shared[0].prompts:
            raise RecipeError(
                f"shared_experts[0] has no positive_prompts, which gate_mode {self.mixture.gate_mode} needs",
                "Give texts that this expert should process.",
            )
        return self._rows(name, layer, first, 1)

    def _rows(self, name: str, layer: int, first: int, count: int) -> StoredTensor:
        shape, mode = (count, self.embedding.shape[1]), self.mixture.gate_mode
        if self._states is not None:
            return self._made(name, shape, HiddenRows(self._states, layer, first, count))
        if mode in RANDOM:
            return self._made(name, shape, RandomRows(self.recipe.seed, name, shape, mode == "uniform_random"))
        return self._made(name, shape, EmbeddedPrompts(self.embedding, self._prompts[first : first + count]))

    def _made(self, name: str, shape: tuple[int, int], make: ValueFunction) -> StoredTensor:
        needed, error = (0, None) if self._states is None else (self._states.needed, TOLERANCE)
        return MadeTensor(
            name, F32, shape, self.embedding.file, self.embedding.offset, make, self.mixture.gate_mode, needed, error,
            self._recent,
        )  # fmt: skip


def _check_prompts(mixture: Mixture, allowed: bool) -> None:
    """Check that the experts differ, and that their prompts do."""
    kinds = {(each.model, each.scale) for each in mixture.experts if not each.noise}
    if len(kinds) == 1 < len(mixture.experts) and not any(each.noise for each in mixture.experts) and not allowed:
        raise MismatchError(
            f"All experts are {mixture.experts[0].model}, so they all compute the same",
            "Give several models; or gate_mode: random, or --allow_mismatch, for a model that will be trained.",
        )
    seen = dict[object, int]()
    for number, each in enumerate(mixture.experts):
        key = _prompts_of(each)
        if key in seen and not allowed:
            raise MismatchError(
                f"experts[{seen[key]}] and experts[{number}] have the same prompts: the router cannot distinguish them",
                "Give each its own prompts, or gate_mode: random for a model that will be trained. "
                "To make it anyway: --allow_mismatch.",
            )
        seen[key] = number


def _prompts_of(expert: Expert) -> object:
    return frozenset(expert.prompts), frozenset(expert.negative)
