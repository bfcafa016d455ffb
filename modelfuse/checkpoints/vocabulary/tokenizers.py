"""Read tokenizer.json: the ids of all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelfuse.checkpoints import read_json
from modelfuse.checkpoints.vocabulary.converted import converted
from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl, is_file

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
#: Files of tokenizers that transformers is asked to read.
OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
#: The largest vocabulary.
MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary of a model.

    Attributes:
        folder: Where its files are.
        kind: The type of its model: ``BPE``, ``WordPiece``, ``WordLevel`` or ``Unigram``.
        tokens: The id of each token.
        added: The settings of added tokens, special ones among them, by token.
        content: The content of the file.
    """

    folder: PathOrUrl
    kind: str
    tokens: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    content: Mapping[str, Any] = field(repr=False)

    @property
    def rows(self) -> int:
        """The number of rows that an embedding needs for it."""
        return max(self.tokens.values(), default=-1) + 1


def read_tokenizer(folder: PathOrUrl) -> Tokenizer:
    """Read a model's tokenizer.json, or what it would be.

    Args:
        folder: The model's.

    Raises:
        CheckpointError: If there is no tokenizer, or it is malformed.
        MissingExtraError: If there is one of another kind, and a library that reads it is not installed.
    """
    path = folder / TOKENIZER_FILE
    if not is_file(path):
        others = [name for name in OTHER_FILES if is_file(folder / name)]
        if others:
            return tokenizer_of(converted(folder, others[0]), folder / others[0])
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE}, so its vocabulary is not known",
            "Name a model with a tokenizer as the tokenizer's source, or leave the tokenizer out.",
        )
    return tokenizer_of(read_json(path), path)


def tokenizer_of(content: Mapping[str, Any], path: PathOrUrl) -> Tokenizer:
    """The vocabulary that a tokenizer.json describes.

    Args:
        content: What is in it.
        path: Where it is.

    Raises:
        CheckpointError: If it is malformed.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path} has no model")
    added = _added(content.get("added_tokens"), path)
    tokens = _vocabulary(model.get("vocab"), path)
    for token, settings in added.items():
        number = settings["id"]
        if tokens.setdefault(token, number) != number:
            raise CheckpointError(f"{path}: the token {token!r} has the numbers {tokens[token]} and {number}")
    seen = dict[int, str]()
    for token, number in tokens.items():
        if type(number) is not int or not 0 <= number < MOST_TOKENS:
            raise CheckpointError(f"{path}: the token {token!r} has the number {number!r}")
        if seen.setdefault(number, token) != token:
            raise CheckpointError(f"{path}: the tokens {seen[number]!r} and {token!r} both have the number {number}")
    return Tokenizer(path.parent, _kind(model), tokens, added, content)


def _kind(model: Mapping[str, Any]) -> str:
    kind = model.get("type")
    if isinstance(kind, str):
        return kind
    return "BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"


def _added(listed: object, path: PathOrUrl) -> dict[str, Mapping[str, Any]]:
    added = dict[str, Mapping[str, Any]]()
    for each in listed if isinstance(listed, list) else []:
        if not isinstance(each, dict) or not isinstance(each.get("content"), str) or type(each.get("id")) is not int:
            raise CheckpointError(f"{path}: an added token has no content or no id")
        added[each["content"]] = each
    return added


def _vocabulary(vocab: object, path: PathOrUrl) -> dict[str, Any]:
    """The ids of the model's tokens, from a map or a list of tokens with scores."""
    if isinstance(vocab, dict):
        return dict(vocab)
    if isinstance(vocab, list) and all(isinstance(each, list) and each and isinstance(each[0], str) for each in vocab):
        tokens = dict[str, Any]()
        for number, (token, *_) in enumerate(vocab):
            tokens.setdefault(token, number)  # For duplicates, the first id counts.
        return tokens
    raise CheckpointError(f"{path} has a vocabulary that is not understood")
