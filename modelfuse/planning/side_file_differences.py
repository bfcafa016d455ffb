"""Differences between the files beside two models' weights: tokenizers, chat templates, stop tokens, code."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from modelfuse.checkpoints.json_files import read_json
from modelfuse.checkpoints.vocabulary.tokenizers import TOKENIZER_FILE, Tokenizer, tokenizer_of
from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl, children, folder_of, is_file, size_of
from modelfuse.storage.files import read_whole

#: Larger files are not compared, in bytes.
LARGEST = 256_000_000
TEMPLATE, TEMPLATES = "chat_template.jinja", "chat_template.json"
TOKENIZER_CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
#: Files of tokenizers other than tokenizer.json.
VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
                "tekken.json", "qwen.tiktoken")  # fmt: skip
#: Configurations of image, audio and video processors.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
              "image_processor_config.json")  # fmt: skip
#: Small files that are compared, besides code.
COMPARED = (TOKENIZER_FILE, TOKENIZER_CONFIG, GENERATION, TEMPLATE, TEMPLATES, "special_tokens_map.json",
            "added_tokens.json", *PROCESSORS)  # fmt: skip
#: The most examples in a message.
MOST_SHOWN = 4


About = Literal["tokenizer", "template", "generation", "other"]


class SideFileDifference(NamedTuple):
    """A difference between the files of two folders.

    Attributes:
        text: A description, which begins with "it" or "its" for the other model.
        serious: Whether the output lacks something that users of the other model rely on.
        about: The kind of file.
    """

    text: str
    serious: bool = False
    about: About = "other"


@dataclass(frozen=True)
class FolderFiles:
    """The files of a model's folder, which are read when they are needed.

    Attributes:
        folder: The folder.
        names: The names of its files.
    """

    folder: PathOrUrl
    names: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, path: PathOrUrl) -> FolderFiles:
        """The files of a model's or adapter's folder; ``path`` may be a weight file in it."""
        folder = folder_of(path)
        here = {each.name for each in children(folder) if is_file(each)}
        return cls(folder, frozenset(here))

    def json(self, name: str) -> Mapping[str, object]:
        """The content of a JSON file; empty if it is missing or malformed."""
        if name not in self.names or size_of(self.folder / name) > LARGEST:
            return {}
        try:
            return read_json(self.folder / name)
        except CheckpointError:
            return {}

    def content(self, name: str) -> bytes | None:
        """The bytes of a file; None if it is missing or larger than ``LARGEST``."""
        if name not in self.names or size_of(self.folder / name) > LARGEST:
            return None
        return bytes(read_whole(self.folder / name))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The vocabulary of tokenizer.json; None if it is missing or cannot be read."""
        content = self.json(TOKENIZER_FILE)
        try:
            return tokenizer_of(content, self.folder / TOKENIZER_FILE) if content else None
        except CheckpointError:
            return None

    @cached_property
    def template(self) -> object:
        """The chat template from any of the files that can contain it; None if there is none."""
        own = self.content(TEMPLATE)
        if own is not None:
            return own.decode(errors="replace")
        return self.json(TEMPLATES).get("chat_template") or self.json(TOKENIZER_CONFIG).get("chat_template")

    @cached_property
    def stops(self) -> frozenset[int]:
        """The ids of the tokens that end generation."""
        ends = self.json(GENERATION).get("eos_token_id", self.json("config.json").get("eos_token_id"))
        return frozenset(each for each in (ends if isinstance(ends, list) else [ends]) if isinstance(each, int))

    @cached_property
    def end(self) -> str | None:
        """The eos_token of tokenizer_config.json."""
        token = self.json(TOKENIZER_CONFIG).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are tokenizer files."""
        return not self.names.isdisjoint((TOKENIZER_FILE, TOKENIZER_CONFIG, *VOCABULARIES))


def serving_differences(
    taken: FolderFiles, other: FolderFiles, name: str = "the output"
) -> Iterator[SideFileDifference]:
    """Differences in tokenizer, chat template and generation settings.

    Args:
        taken: The folder whose files the output gets.
        other: The other model's folder.
        name: What messages call the owner of ``taken``.
    """
    kinds: list[tuple[About, Callable[[FolderFiles, FolderFiles, str], Iterator[SideFileDifference]]]] = [
        ("tokenizer", _of_tokenizers), ("template", _of_templates), ("generation", _of_stops),
    ]  # fmt: skip
    for about, differences in kinds:
        yield from (each._replace(about=about) for each in differences(taken, other, name))


def _of_tokenizers(taken: FolderFiles, other: FolderFiles, name: str) -> Iterator[SideFileDifference]:
    if not other.has_tokenizer:
        return
    if not taken.has_tokenizer:
        yield SideFileDifference(f"it has a tokenizer, and {name} has none", serious=True)
        return
    same = other.content(TOKENIZER_FILE)
    if same is not None and same == taken.content(TOKENIZER_FILE):
        return
    ours, theirs = taken.tokenizer, other.tokenizer
    if ours is None or theirs is None:
        differ = [name for name in VOCABULARIES if _differ(name, taken, other)]
        if differ:
            yield SideFileDifference(
                f"its {', '.join(differ)} differs: the same text may be tokenized differently", serious=True
            )
        return
    if ours.tokens != theirs.tokens:
        yield from _of_tokens(ours, theirs, name)
    keys = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    changed = [key for key in keys if ours.content.get(key) != theirs.content.get(key)]
    merges = [
        each.content["model"].get("merges") for each in (ours, theirs)
    ]  # tokenizer_of has checked that it is a map.
    changed += ["merges"] if _pairs(merges[0]) != _pairs(merges[1]) and ours.tokens == theirs.tokens else []
    if changed:
        yield SideFileDifference(f"its tokenizer.json has another {', '.join(changed)}")


def _of_tokens(ours: Tokenizer, theirs: Tokenizer, name: str) -> Iterator[SideFileDifference]:
    at = {number: token for token, number in ours.tokens.items()}
    moved = [(number, at[number], token) for token, number in theirs.tokens.items() if at.get(number, token) != token]
    lost = [token for token in theirs.tokens if token not in ours.tokens]
    if moved:
        shown = "; ".join(f"{number} is {one!r} and {other!r}" for number, one, other in sorted(moved)[:MOST_SHOWN])
        yield SideFileDifference(
            f"its tokenizer gives {len(moved)} token ids to other tokens ({shown}{_more(moved)})",
            serious=True,
        )  # fmt: skip
    if lost:
        yield SideFileDifference(f"{name}'s tokenizer lacks {len(lost)} of its tokens: {_some(lost)}", serious=True)


def _of_templates(taken: FolderFiles, other: FolderFiles, name: str) -> Iterator[SideFileDifference]:
    if other.template is None or other.template == taken.template:
        return
    if taken.template is None:
        yield SideFileDifference(f"it has a chat template, and {name} has none", serious=True)
    else:
        yield SideFileDifference("its chat template differs")


def _of_stops(taken: FolderFiles, other: FolderFiles, name: str) -> Iterator[SideFileDifference]:
    if GENERATION in other.names and (lost := other.stops - taken.stops):
        numbers = ", ".join(sorted(map(str, lost)))
        yield SideFileDifference(
            f"it stops generation at the tokens {numbers}, which do not stop {name}'s", serious=True
        )
    if other.end is not None and taken.end is not None and other.end != taken.end:
        yield SideFileDifference(f"its eos_token is {other.end!r}, {name}'s {taken.end!r}", serious=True)
    ours, theirs = taken.json(GENERATION), other.json(GENERATION)
    skipped = ("transformers_version", "_from_model_config", "eos_token_id")
    changed = sorted(
        key for key in ours.keys() & theirs.keys() if key not in skipped and ours[key] != theirs[key]
    )  # fmt: skip
    if changed:
        yield SideFileDifference(f"its generation_config.json has another {', '.join(changed)}")


def processor_and_code_differences(reference: FolderFiles, other: FolderFiles) -> Iterator[SideFileDifference]:
    """Differences in processor configurations and Python code."""
    changed = [name for name in PROCESSORS if _differ(name, reference, other)]
    if changed:
        yield SideFileDifference(f"its {', '.join(changed)} differs")
    code = sorted(
        name for name in reference.names & other.names if name.endswith(".py") and _differ(name, reference, other)
    )  # fmt: skip
    if code:
        yield SideFileDifference(f"its code differs: {_some(code)}")


def _differ(name: str, one: FolderFiles, other: FolderFiles) -> bool:
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
    """Merges as pairs. Old releases of tokenizers write a pair as one string with a space."""
    if not isinstance(merges, list):
        return None
    return [each.split(" ") if isinstance(each, str) else each for each in merges]


def _some(words: Collection[str]) -> str:
    return f"{', '.join(list(words)[:MOST_SHOWN])}{_more(words)}"


def _more(found: Collection[object]) -> str:
    return f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""


def compared_files(names: Iterable[str]) -> list[str]:
    """The names of the files that are compared with other models'."""
    return [name for name in names if name in COMPARED or (name.endswith(".py") and "/" not in name)]
