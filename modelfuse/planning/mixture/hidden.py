"""Routers from hidden states of prompts: the base is run once by transformers, in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters.arrays import Array, Recent
from modelfuse.dtypes import BF16
from modelfuse.errors import CheckpointError, MismatchError
from modelfuse.planning.mixture.tensors import Prompts, Tokens, direction, whole
from modelfuse.planning.optional_packages import require
from modelfuse.storage import PathOrUrl, Url

#: Tolerance of routers computed on other machines, relative to the largest element, as products are in bfloat16.
TOLERANCE = 0.05
INSTEAD = "use gate_mode: cheap_embed or random"


@dataclass(frozen=True)
class PromptStates:
    """Hidden states of prompts at the input of each of the base's layers.

    Attributes:
        base: The base.
        folder: The folder of its config.json.
        prompts: For each expert, the tokens of its prompts and of its negative prompts.
        average: Whether to average the states of all tokens of a prompt; else the last token's state is used.
        recent: Cache of the result.
    """

    base: Checkpoint = field(compare=False)
    folder: PathOrUrl
    prompts: Prompts
    average: bool
    recent: Recent = field(compare=False, repr=False)

    @property
    def needed(self) -> int:
        """Bytes of the base in bfloat16."""
        return sum(BF16.nbytes(tensor.size) for tensor in self.base.values())

    def rows(self) -> Array:
        """The rows of all layers' routers: float32, of shape [layers, experts, width]."""
        found: Array = self.recent.get(self, self._compute)
        return found

    def _compute(self) -> Array:
        import torch

        model = _model(self.base, self.folder)
        with torch.inference_mode():
            made = [self._row(model, wanted, unwanted) for wanted, unwanted in self.prompts]
        return np.stack(made, axis=1).astype(np.float32)

    def _row(self, model: Any, wanted: Sequence[Tokens], unwanted: Sequence[Tokens]) -> Array:
        states = self._mean(model, wanted)
        if unwanted:
            states = states - self._mean(model, unwanted)
        return np.stack([direction(each) for each in states])

    def _mean(self, model: Any, prompts: Sequence[Tokens]) -> Array:
        """The mean of the prompts' states: float64, of shape [layers, width]."""
        import torch

        total: Array | None = None
        for prompt in prompts:
            hidden = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states[:-1]
            states = [each[0].double() for each in hidden]
            own = np.stack([(each.mean(0) if self.average else each[-1]).numpy() for each in states])
            total = own if total is None else total + own
        assert total is not None
        return total / len(prompts)


@dataclass(frozen=True)
class HiddenRows:
    """Computes rows of one layer's router.

    Attributes:
        states: The states of all layers.
        layer: The index of the layer.
        first: The index of the first expert.
        count: The number of experts.
    """

    states: PromptStates
    layer: int
    first: int
    count: int

    def __call__(self) -> Array:
        """The rows: float32, of shape [count, width]."""
        rows: Array = self.states.rows()[self.layer, self.first : self.first + self.count]
        return rows


def prompt_states(base: Checkpoint, folder: PathOrUrl, prompts: Prompts, mode: str) -> PromptStates:
    """The hidden states of prompts, which are computed when they are first needed.

    Raises:
        CheckpointError: If the base is not in a local folder.
        MissingExtraError: If transformers or torch is not installed.
    """
    require("transformers", f"gate_mode {mode}", INSTEAD)
    require("torch", f"gate_mode {mode}", INSTEAD)
    if isinstance(folder, Url):
        raise CheckpointError(
            f"gate_mode {mode} runs the base, but {folder} is not a local folder", f"Download it first, or {INSTEAD}."
        )
    return PromptStates(base, folder, prompts, mode == "hidden_avg", Recent(1))


def _model(base: Checkpoint, folder: PathOrUrl) -> Any:
    """The base as a transformers model without its head. No code from the model's folder is run."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        state = {name: torch.from_numpy(whole(tensor).astype(np.float32)).bfloat16() for name, tensor in base.items()}
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, found = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.bfloat16, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{base.path}: transformers cannot run it: {error}", f"To do without it: {INSTEAD}."
        ) from error
    missing = [name for name in found["missing_keys"] if not name.endswith("lm_head.weight")]
    if missing:
        raise MismatchError(f"{base.path}: transformers misses {', '.join(sorted(missing)[:5])}")
    model.eval()
    return getattr(model, model.base_model_prefix)
