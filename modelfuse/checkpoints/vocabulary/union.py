"""The tokenizer of an output: that of one input, or the union of all, with additional tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelfuse.checkpoints.vocabulary.tokenizers import Tokenizer

#: The settings of a token that is added as a whole string, in the order in which the tokenizers library writes them.
PLAIN: Mapping[str, Any] = {
    "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False,
}  # fmt: skip


@dataclass(frozen=True)
class OutputVocabulary:
    """The vocabulary of an output.

    Attributes:
        tokenizer: The tokenizer of the input whose files are used.
        tokens: The id of each token.
        added: Tokens that this input lacks, with their settings and ids.
        removed: Tokens of this input that the output lacks.
        conflicts: Added tokens whose settings differ between inputs.
    """

    tokenizer: Tokenizer
    tokens: Mapping[str, int]
    added: tuple[Mapping[str, Any], ...] = ()
    removed: frozenset[str] = frozenset()
    conflicts: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """The number of rows up to the last one with a token."""
        return max(self.tokens.values(), default=-1) + 1

    @property
    def is_changed(self) -> bool:
        """Whether the tokenizer differs from the input's."""
        return bool(self.added or self.removed)

    def tokenizer_json(self) -> bytes:
        """The content of the output's tokenizer.json."""
        content = dict(self.tokenizer.content)
        model = dict(content["model"])
        if self.removed:
            _remove(model, self.removed)
        content["model"] = model
        own = [each for each in content.get("added_tokens") or [] if each["content"] not in self.removed]
        content["added_tokens"] = sorted([*own, *self.added], key=lambda each: each["id"])
        return _encoded(content)

    def tokenizer_config(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content of the output's tokenizer_config.json.

        Args:
            content: What is in the input's.
        """
        changed, decoder = dict(content), content.get("added_tokens_decoder")
        if not isinstance(decoder, dict):
            return changed
        gone = {str(self.tokenizer.tokens[token]) for token in self.removed}
        own = {number: each for number, each in decoder.items() if number not in gone}
        more = {str(each["id"]): {key: each[key] for key in ("content", *PLAIN)} for each in self.added}
        changed["added_tokens_decoder"] = {**own, **more}
        return changed


def one_of(tokenizer: Tokenizer, extra: Iterable[str] = (), limit: int | None = None) -> OutputVocabulary:
    """An input's tokenizer, with more tokens.

    Args:
        tokenizer: The input's.
        extra: Tokens that the output is to have.
        limit: Leave out tokens from this number on, where that can be done.
    """
    removed = frozenset[str]()
    if limit is not None and tokenizer.kind == "BPE":
        removed = frozenset(token for token, number in tokenizer.tokens.items() if number >= limit)
    kept = {token: number for token, number in tokenizer.tokens.items() if token not in removed}
    return _extended(tokenizer, kept, removed, ((token, PLAIN) for token in extra), ())


def union_of(
    tokenizers: Sequence[Tokenizer], limits: Sequence[int | None], extra: Iterable[str] = ()
) -> OutputVocabulary:
    """The first input's tokenizer, extended by the tokens of the others.

    Args:
        tokenizers: One an input, the base first.
        limits: Of each, the number from which on tokens count as absent; None: there is none.
        extra: Tokens that the output is to have.
    """
    first = tokenizers[0]
    here = [_present(each, limit) for each, limit in zip(tokenizers, limits, strict=True)]
    removed = frozenset(first.tokens) - here[0].keys() if first.kind == "BPE" else frozenset[str]()
    kept = {token: number for token, number in first.tokens.items() if token not in removed}
    words = ((token, PLAIN) for each, own in zip(tokenizers[1:], here[1:], strict=True)
             for token in _by_number(own) if token not in each.added)  # fmt: skip
    marks = ((token, each.added[token]) for each, own in zip(tokenizers[1:], here[1:], strict=True)
             for token in _by_number(own) if token in each.added)  # fmt: skip
    more = ((token, PLAIN) for token in extra)
    return _extended(first, kept, removed, _each_of(words, marks, more), _conflicts(tokenizers))


def _each_of(*several: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for each in several:
        yield from each


def _present(tokenizer: Tokenizer, limit: int | None) -> Mapping[str, int]:
    if limit is None or tokenizer.rows <= limit:
        return tokenizer.tokens
    return {token: number for token, number in tokenizer.tokens.items() if number < limit}


def _by_number(tokens: Mapping[str, int]) -> list[str]:
    return sorted(tokens, key=tokens.__getitem__)


def _extended(
    tokenizer: Tokenizer,
    kept: dict[str, int],
    removed: frozenset[str],
    more: Iterable[tuple[str, Mapping[str, Any]]],
    conflicts: tuple[str, ...],
) -> OutputVocabulary:
    """A tokenizer without some tokens, and with others appended."""
    tokens, added = dict(kept), list[Mapping[str, Any]]()
    number = max(tokens.values(), default=-1) + 1
    for token, settings in more:
        if token not in tokens:
            added.append({"id": number, "content": token, **{key: settings.get(key, PLAIN[key]) for key in PLAIN}})
            tokens[token] = number
            number += 1
    return OutputVocabulary(tokenizer, tokens, tuple(added), removed, conflicts)


def _conflicts(tokenizers: Sequence[Tokenizer]) -> tuple[str, ...]:
    first, found = dict[str, Mapping[str, Any]](), dict[str, None]()
    for tokenizer in tokenizers:
        for token, settings in tokenizer.added.items():
            other = first.setdefault(token, settings)
            if any(other.get(key, PLAIN[key]) != settings.get(key, PLAIN[key]) for key in PLAIN):
                found[token] = None
    return tuple(found)


def _remove(model: dict[str, Any], removed: frozenset[str]) -> None:
    """Remove tokens from a BPE model, and the merges that produce them."""
    model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in removed}
    if isinstance(model.get("merges"), list):
        model["merges"] = [each for each in model["merges"] if not _makes(each, removed)]


def _makes(merge: object, removed: frozenset[str]) -> bool:
    parts = merge.split(" ") if isinstance(merge, str) else merge if isinstance(merge, list) else []
    return "".join(map(str, parts)) in removed or any(str(part) in removed for part in parts)


def _encoded(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")
