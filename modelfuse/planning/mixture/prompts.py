"""Tokenize the prompts of experts with the base's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from modelfuse.checkpoints import read_json
from modelfuse.checkpoints.vocabulary.tokenizers import TOKENIZER_CONFIG, read_tokenizer
from modelfuse.errors import CheckpointError, MismatchError
from modelfuse.planning.mixture.tensors import Prompts, Tokens
from modelfuse.planning.optional_packages import require
from modelfuse.recipe.arcee.mixture import Expert
from modelfuse.storage import PathOrUrl, has_file

INSTEAD = "use gate_mode: random"


class PromptReader:
    """Tokenizes prompts, with the bos_token first if the tokenizer has one.

    Args:
        folder: The base's folder.
        rows: The number of rows of its embedding.
        mode: The gate mode, for error messages.

    Raises:
        CheckpointError: If there is no tokenizer, or it cannot be read.
        MissingExtraError: If tokenizers is not installed.
    """

    def __init__(self, folder: PathOrUrl, rows: int, mode: str) -> None:
        self._folder, self._rows = folder, rows
        content = read_tokenizer(folder).content
        require("tokenizers", f"gate_mode {mode}", INSTEAD)
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # The library raises plain Exception.
            raise CheckpointError(f"{folder}: the tokenizers library cannot read its tokenizer: {error}") from error
        self._first = self._begin()

    def tokens(self, experts: Sequence[Expert]) -> Prompts:
        """For each expert, the tokens of its prompts and of its negative prompts.

        Raises:
            MismatchError: If a prompt has no tokens, or a token that the embedding lacks.
        """
        return tuple(
            (tuple(map(self._tokens, each.prompts)), tuple(map(self._tokens, each.negative))) for each in experts
        )

    def _begin(self) -> Tokens:
        path = self._folder / TOKENIZER_CONFIG
        said = read_json(path).get("bos_token") if has_file(path) else None
        text = said.get("content") if isinstance(said, dict) else said
        number = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        return () if number is None else (number,)

    def _tokens(self, prompt: str) -> Tokens:
        found = (*self._first, *self._tokenizer.encode(prompt, add_special_tokens=False).ids)
        if not found:
            raise MismatchError(f"The prompt {prompt!r} has no tokens", "Give a longer text.")
        if (beyond := max(found)) >= self._rows:
            raise MismatchError(
                f"The prompt {prompt!r} has the token {beyond}, but the embedding has {self._rows} rows",
                f"The tokenizer in {self._folder} does not belong to this model.",
            )
        return found
