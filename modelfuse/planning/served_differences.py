"""What files beside the weights of models contradict each other in: tokenizers, templates, stop tokens, code."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from modelfuse.checkpoints.json_files import read_json
from modelfuse.checkpoints.vocabulary.tokenizers import TOKENIZER_FILE, Tokenizer, tokenizer_of
from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl, children, is_dir, is_file, size_of
from modelfuse.storage.files import read_whole

#: Larger files of this kind are no text.
LARGEST = 256_000_000
TEMPLATE, TEMPLATES = "chat_template.jinja", "chat_template.json"
TOKENIZER_CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
#: What tokenizers are made of, beside tokenizer.json.
VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
                "tekken.json", "qwen.tiktoken")  # fmt: skip
#: How inputs of other kinds are prepared.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
              "image_processor_config.json")  # fmt: skip
#: All that is compared and of small size; code, too.
COMPARED = (TOKENIZER_FILE, TOKENIZER_CONFIG, GENERATION, TEMPLATE, TEMPLATES, "special_tokens_map.json",
            "added_tokens.json", *PROCESSORS)  # fmt: skip
#: Examples in a line.
MOST_SHOWN = 4


About = Literal["tokenizer", "template", "generation", "other"]


class ServedDifference(NamedTuple):
    """What two folders contradict each other in.

    Attributes:
        text: What it is.
        loud: Whether what the other one's users rely on is lost.
        about: What kind of file it is in.
    """

    text: str
    loud: bool = False
    about: About = "other"


@dataclass(frozen=True)
class Served:
    """The files of a model's folder that are compared, read when they are needed."""

    folder: PathOrUrl
    names: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, path: PathOrUrl) -> Served:
        """Those beside the weights of a model or an adapter."""
        folder = path if is_dir(path) else path.parent
        here = {each.name for each in children(folder) if is_file(each)}
        return cls(folder, frozenset(here))

    def json(self, name: str) -> Mapping[str, object]:
        """The content of a JSON file; empty if it is not there, or whoever loads it will find it malformed."""
        if name not in self.names or size_of(self.folder / name) > LARGEST:
            return {}
        try:
            return read_json(self.folder / name)
        except CheckpointError:
            return {}

    def content(self, name: str) -> bytes | None:
        """The bytes of a file, None if it is not there."""
        if name not in self.names or size_of(self.folder / name) > LARGEST:
            return None
        return bytes(read_whole(self.folder / name))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The vocabulary, if it is one that can be read."""
        content = self.json(TOKENIZER_FILE)
        try:
            return tokenizer_of(content, self.folder / TOKENIZER_FILE) if content else None
        except CheckpointError:
            return None

    @cached_property
    def template(self) -> object:
        """The chat template, wherever it is written; None if there is none."""
        own = self.content(TEMPLATE)
        if own is not None:
            return own.decode(errors="replace")
        return self.json(TEMPLATES).get("chat_template") or self.json(TOKENIZER_CONFIG).get("chat_template")

    @cached_property
    def stops(self) -> frozenset[int]:
        """What generation ends with: numbers of tokens, and the token that the tokenizer's settings name."""
        ends = self.json(GENERATION).get("eos_token_id", self.json("config.json").get("eos_token_id"))
        return frozenset(each for each in (ends if isinstance(ends, list) else [ends]) if isinstance(each, int))

    @cached_property
    def end(self) -> str | None:
        """The token that the tokenizer's settings name as the end."""
        token = self.json(TOKENIZER_CONFIG).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are files of a tokenizer."""
        return not self.names.isdisjoint((TOKENIZER_FILE, TOKENIZER_CONFIG, *VOCABULARIES))


def served_differences(taken: Served, other: Served, name: str = "the output") -> Iterator[ServedDifference]:
    """What a model's own files say otherwise than those that the output gets.

    Args:
        taken: The folder that tokenizer, template and generation settings are taken from.
        other: The model's.
        name: What has those that are taken, in words.
    """
    kinds: list[tuple[About, Callable[[Served, Served, str], Iterator[ServedDifference]]]] = [
        ("tokenizer", _of_tokenizers), ("template", _of_templates), ("generation", _of_stops),
    ]  # fmt: skip
    for about, differences in kinds:
        yield from (each._replace(about=about) for each in differences(taken, other, name))


def _of_tokenizers(taken: Served, other: Served, name: str) -> Iterator[ServedDifference]:
    if not other.has_tokenizer:
        return
    if not taken.has_tokenizer:
        yield ServedDifference(f"it has a tokenizer, and {name} has none", loud=True)
        return
    same = other.content(TOKENIZER_FILE)
    if same is not None and same == taken.content(TOKENIZER_FILE):
        return
    ours, theirs = taken.tokenizer, other.tokenizer
    if ours is None or theirs is None:
        differ = [name for name in VOCABULARIES if _differ(name, taken, other)]
        if differ:
            yield ServedDifference(
                f"its {', '.join(differ)} is another one: the same text may become other tokens", True
            )
        return
    if ours.tokens != theirs.tokens:
        yield from _of_tokens(ours, theirs, name)
    keys = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    changed = [key for key in keys if ours.content.get(key) != theirs.content.get(key)]
    merges = [each.content["model"].get("merges") for each in (ours, theirs)]  # A map, or it were no tokenizer.
    changed += ["merges"] if _pairs(merges[0]) != _pairs(merges[1]) and ours.tokens == theirs.tokens else []
    if changed:
        yield ServedDifference(f"its tokenizer.json has another {', '.join(changed)}")


def _of_tokens(ours: Tokenizer, theirs: Tokenizer, name: str) -> Iterator[ServedDifference]:
    at = {number: token for token, number in ours.tokens.items()}
    moved = [(number, at[number], token) for token, number in theirs.tokens.items() if at.get(number, token) != token]
    lost = [token for token in theirs.tokens if token not in ours.tokens]
    if moved:
        shown = "; ".join(f"{number} is {one!r} and {other!r}" for number, one, other in sorted(moved)[:MOST_SHOWN])
        yield ServedDifference(
            f"its tokenizer numbers tokens otherwise ({len(moved)} numbers are two tokens: {shown}{_more(moved)})",
            loud=True,
        )  # fmt: skip
    if lost:
        yield ServedDifference(f"{name}'s tokenizer lacks {len(lost)} of its tokens: {_some(lost)}", loud=True)


def _of_templates(taken: Served, other: Served, name: str) -> Iterator[ServedDifference]:
    if other.template is None or other.template == taken.template:
        return
    if taken.template is None:
        yield ServedDifference(f"it has a chat template, and {name} has none", loud=True)
    else:
        yield ServedDifference("its chat template is another one")


def _of_stops(taken: Served, other: Served, name: str) -> Iterator[ServedDifference]:
    if GENERATION in other.names and (lost := other.stops - taken.stops):
        numbers = ", ".join(sorted(map(str, lost)))
        yield ServedDifference(f"it ends answers with the tokens {numbers}, which do not end {name}'s", loud=True)
    if other.end is not None and taken.end is not None and other.end != taken.end:
        yield ServedDifference(f"its eos_token is {other.end!r}, {name}'s {taken.end!r}", loud=True)
    ours, theirs = taken.json(GENERATION), other.json(GENERATION)
    skipped = ("transformers_version", "_from_model_config", "eos_token_id")
    changed = sorted(
        key for key in ours.keys() & theirs.keys() if key not in skipped and ours[key] != theirs[key]
    )  # fmt: skip
    if changed:
        yield ServedDifference(f"its generation_config.json has another {', '.join(changed)}")


def other_differences(reference: Served, other: Served) -> Iterator[ServedDifference]:
    """What else a model's files say otherwise than the reference's: how inputs are prepared, and code."""
    changed = [name for name in PROCESSORS if _differ(name, reference, other)]
    if changed:
        yield ServedDifference(f"its {', '.join(changed)} is another one")
    code = sorted(
        name for name in reference.names & other.names if name.endswith(".py") and _differ(name, reference, other)
    )  # fmt: skip
    if code:
        yield ServedDifference(f"its code is another one: {_some(code)}")


def _differ(name: str, one: Served, other: Served) -> bool:
    contents = one.content(name), other.content(name)
    if None in contents or contents[0] == contents[1]:
        return False
    if not name.endswith(".json"):
        return True
    try:
        first, second = (json.loads(each or b"") for each in contents)
        skipped = ("transformers_version", "_processor_class", "processor_class", "image_processor_type")
        both = first.keys() & second.keys() if isinstance(first, dict) and isinstance(second, dict) else ()
        return any(first[key] != second[key] for key in both if key not in skipped)
    except (ValueError, RecursionError):
        return True


def _pairs(merges: object) -> object:
    """Merges as pairs: old releases write both with a space between."""
    if not isinstance(merges, list):
        return None
    return [each.split(" ") if isinstance(each, str) else each for each in merges]


def _some(words: Collection[str]) -> str:
    return f"{', '.join(list(words)[:MOST_SHOWN])}{_more(words)}"


def _more(found: Collection[object]) -> str:
    return f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""


def wanted_beside(names: Iterable[str]) -> list[str]:
    """Of a model's files, those that are compared with others'."""
    return [name for name in names if name in COMPARED or (name.endswith(".py") and "/" not in name)]
