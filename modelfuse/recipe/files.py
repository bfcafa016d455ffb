"""Read recipe files: JSON, and a subset of YAML.

No aliases, so a short text cannot stand for a long one; no tags, so every value is text, a number, true, false, null,
a list or a map; no key twice. Dates stay text, as they may be names of folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from modelfuse.errors import CheckpointError, RecipeError
from modelfuse.storage import PathOrUrl, Url
from modelfuse.storage.files import read_whole

if TYPE_CHECKING:
    from yaml import Node, SafeLoader

    Pairs = list[tuple[Node, Node]]

#: The largest recipe in bytes; larger ones take yaml seconds.
MAX_BYTES = 200_000
#: Keys of mergekit's configurations: each has exactly one of these, and is recognized by it.
CONTENT_KEYS = ("models", "slices", "modules")
#: The key by which mergekit-moe's configurations are recognized.
EXPERTS_KEY = "experts"
_KNOWN_BY = (*CONTENT_KEYS, EXPERTS_KEY)
#: The most lines and structural characters: yaml takes a second for these.
MOST_MARKS = 15_000
_MARKS = re.compile(r"[\n\r,:\[{?&]")
#: The most values after expanding aliases.
MAX_VALUES = 100_000
#: The deepest nesting.
MAX_DEPTH = 50
#: The key by which a merge_config.json is recognized, and its settings that do not apply to another merge.
RECORD, RECORDED = "modelfuse_version", ("output_path", "overwrite", "intermediate_dir")
#: The key of maps whose keys a map takes, where it has none of that name.
MERGE = "<<"
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


def load_recipe(path: PathOrUrl) -> dict[str, object]:
    """Read the settings in a .json or .yaml recipe; ``Recipe.parse`` checks them.

    The output path and similar settings of a merge_config.json are left out. A mergekit configuration is read as a
    single setting, its text.

    Raises:
        RecipeError: If the file cannot be read or is not a map of settings.
    """
    text = _read(path)
    if _may_be_configuration(text) and any(map(is_configuration, load_documents(text))):
        return {"mergekit": text}
    try:
        content = json.loads(text, object_pairs_hook=_unique) if path.suffix == ".json" else _load_yaml(text)
    except RecursionError as error:
        raise RecipeError(f"The recipe {path} is malformed: it is nested too deeply") from error
    except ValueError as error:
        raise RecipeError(f"The recipe {path} is malformed: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"The recipe {path} is not a map of settings to values")
    if RECORD in content:
        return {name: value for name, value in content.items() if name not in RECORDED}
    return content


def _read(path: PathOrUrl) -> str:
    try:
        if isinstance(path, Url):
            content = read_whole(path)
        else:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"The recipe {path} has more than {MAX_BYTES:,} bytes; it is no recipe")
        return content.decode("utf-8-sig")
    except CheckpointError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.message}", error.hint) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError(f"{_twice(name for name, _ in pairs)} is given twice")
    return keys


def _twice(names: Iterable[str]) -> str:
    """The first duplicate name; there must be one."""
    seen = set[str]()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _may_be_configuration(text: str) -> bool:
    """Whether the text contains one of the keys of configurations, a cheap test before parsing."""
    return re.search(rf"""(?m)(?:^|[{{,])\s*["']?(?:{"|".join(_KNOWN_BY)})["']?\s*:""", text) is not None


def is_configuration(content: object) -> bool:
    """Whether the content of a file is a mergekit configuration, by its keys.

    >>> is_configuration({"merge_method": "linear", "models": []}), is_configuration({"merge_method": "linear"})
    (True, False)
    """
    return isinstance(content, dict) and any(key in content for key in _KNOWN_BY)


def is_mixture(content: Mapping[object, object]) -> bool:
    """Whether a configuration is one of mergekit-moe, by its keys."""
    return EXPERTS_KEY in content and not any(key in content for key in CONTENT_KEYS)


def load_documents(text: str) -> list[object]:
    """Read the documents of a YAML text. They may have aliases and merge keys, as long as they stand for no long text.

    Raises:
        RecipeError: If it is malformed.
    """
    try:
        documents = _documents(text, aliases=True)
        _count_values(documents)
    except RecursionError as error:
        raise RecipeError("The configuration is malformed: it is nested too deeply") from error
    except ValueError as error:
        raise RecipeError(f"The configuration is malformed: {error}") from error
    return documents


def dump_documents(documents: Iterable[object]) -> str:
    """Dump plain values as the documents of a YAML text."""
    import yaml

    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)


def _count_values(value: object, count: int = 0, depth: int = 0) -> int:
    """The number of values in a value, counting aliases each time."""
    if depth > MAX_DEPTH:
        raise RecursionError
    count += 1
    if count > MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {MAX_VALUES:,} values")
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        count = _count_values(part, count, depth + 1)
    return count


def _load_yaml(text: str) -> object:
    documents = _documents(text, aliases=False)
    if len(documents) > 1:
        raise ValueError("it has several documents")
    return documents[0] if documents else None


def _documents(text: str, aliases: bool) -> list[object]:
    import yaml

    if len(_MARKS.findall(text)) > MOST_MARKS:
        raise ValueError(f"it has more than {MOST_MARKS:,} lines and values, too many for a recipe")
    try:
        loader, documents = _loader(aliases)(text), list[object]()
        try:
            while loader.check_data():  # type: ignore[no-untyped-call]
                documents.append(loader.get_data())
            return documents
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


@cache
def _loader(aliases: bool) -> type[SafeLoader]:
    """yaml's safe loader, restricted to the supported subset."""
    import yaml

    class Loader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, token_class: Any) -> None:
            if self.flow_level >= MAX_DEPTH:  # yaml's time is quadratic in the depth.
                raise RecursionError
            super().fetch_flow_collection_start(token_class)

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            if not aliases and self.check_event(yaml.AliasEvent):
                event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                raise yaml.constructor.ConstructorError(
                    None, None, "aliases are not taken; write the value again", event.start_mark
                )
            node = super().compose_node(parent, index)
            if node is not None and node.tag not in PLAIN_TAGS:
                raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} is not taken", node.start_mark)
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(names) > len(set(names)):
                raise yaml.constructor.ConstructorError(None, None, f"{_twice(names)} is given twice", node.start_mark)
            if aliases and MERGE in names:
                node = yaml.MappingNode(node.tag, self._merged(node), node.start_mark, node.end_mark)
            return super().construct_mapping(node, deep)

        def _merged(self, node: yaml.Node) -> Pairs:
            """The keys of a map, then those of the maps that it takes others from, the first of each name."""
            # A page of text could have one map taken a billion times. Nodes are kept, as numbers are used again.
            known: dict[int, tuple[yaml.Node, Pairs]] = vars(self).setdefault("merged_maps", {})
            if id(node) in known:
                return known[id(node)][1]
            if not isinstance(node, yaml.MappingNode):
                message = f"{MERGE} stands for something else than a map, or a list of maps"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
            pairs = [(key, value) for key, value in node.value if key.value != MERGE]
            seen = {key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)}
            for taken in (value for key, value in node.value if key.value == MERGE):
                for each in taken.value if isinstance(taken, yaml.SequenceNode) else [taken]:
                    for key, value in self._merged(each):
                        if not isinstance(key, yaml.ScalarNode) or key.value not in seen:
                            pairs.append((key, value))
                            seen.add(str(key.value))
            known[id(node)] = node, pairs
            return pairs

    plain = {first: [each for each in kinds if each[0] in PLAIN_TAGS]
             for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()}  # fmt: skip
    Loader.yaml_implicit_resolvers = plain
    return Loader
