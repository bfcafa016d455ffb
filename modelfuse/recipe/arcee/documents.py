"""Configuration files: one document, or several that use each other's results as models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.configuration import Configuration
from modelfuse.recipe.arcee.grammar import read_configuration
from modelfuse.recipe.arcee.mixture import Mixture, read_mixture
from modelfuse.recipe.arcee.references import Reference, References, Stage, Weights
from modelfuse.recipe.arcee.structure import check_configuration
from modelfuse.recipe.files import is_mixture, load_documents

#: Characters that a document's name may not have, as it may become the name of a folder.
FORBIDDEN = ("/", "\\", "\0")


@dataclass(frozen=True)
class Configurations:
    """A configuration file.

    Attributes:
        documents: The documents, each after those that it uses; the last is the result.
        models: The meaning of each word that names a model: the first document's base first, then in order.
        mixture: The configuration of mergekit-moe, if the file is one; it then has no documents.
    """

    documents: tuple[Configuration, ...]
    models: Mapping[str, Weights]
    mixture: Mixture | None = None

    @property
    def references(self) -> tuple[Reference, ...]:
        """All distinct models."""
        parts = self.documents if self.mixture is None else (self.mixture,)
        return tuple(dict.fromkeys(each for part in parts for each in part.references))

    @property
    def result(self) -> Configuration:
        """The document whose result is the output."""
        return self.documents[-1]

    def named(self, name: str | None) -> Configuration:
        """The document of a name; without one, that of the result.

        Raises:
            RecipeError: If there is none.
        """
        if name is None:
            return self.result
        found = next((each for each in self.documents if each.name == name), None)
        if found is None:
            raise RecipeError(f"mergekit_document is {name!r}, but no document has this name")
        return found


def read_configurations(text: str, models: Sequence[Weights] | None = None) -> Configurations:
    """Read a configuration file.

    Args:
        text: Its content.
        models: Known meanings of its words, in the order of ``Configurations.models``.

    Raises:
        RecipeError: If anything in it is invalid.
    """
    contents = [each for each in load_documents(text) if each is not None]
    names = [_name(each) for each in contents]
    stages = [name for name in names if name is not None]
    if twice := [name for number, name in enumerate(stages) if name in stages[:number]]:
        raise RecipeError(f"Two documents have the name {twice[0]!r}", "Give each its own.")
    if len(contents) > 1 and len(stages) < len(contents) - 1:
        raise RecipeError(
            f"{len(contents) - len(stages)} documents of the configuration have no name",
            "Give each but the last a name:, by which others use its result.",
        )
    if not contents:
        raise RecipeError("The configuration is empty")
    references = References(stages if len(contents) > 1 else ())
    found = _read(contents, names, references)
    if models is None:
        return found
    if len(models) != len(references.found):
        raise RecipeError(
            f"The configuration names {len(references.found)} models, but model_path_list has {len(models)}",
            "Leave model_path_list out: the configuration names the models.",
        )
    known = dict(zip(references.found, models, strict=True))
    return _read(contents, names, References(references.stages, known))


def _read(contents: Sequence[object], names: Sequence[str | None], references: References) -> Configurations:
    mixtures = [each for each in contents if isinstance(each, Mapping) and is_mixture(each)]
    if mixtures:
        if len(contents) > 1:
            raise RecipeError(
                "A configuration with experts: stands beside other documents", "Give it a file of its own."
            )
        mixture = read_mixture(mixtures[0], references)
        return Configurations((), references.found, mixture)
    read = [read_configuration(each, references) for each in contents]
    for each in read:
        check_configuration(each)
    return Configurations(_in_order(read, names), references.found)


def _name(content: object) -> str | None:
    name = content.get("name") if isinstance(content, Mapping) else None
    if name is None:
        return None
    if not isinstance(name, str) or not name or name in (".", "..") or any(each in name for each in FORBIDDEN):
        raise RecipeError(f"name is {name!r}, which cannot be the name of a result")
    return name


def _in_order(read: Sequence[Configuration], names: Sequence[str | None]) -> tuple[Configuration, ...]:
    """The documents, each after those that it uses; the unnamed one, else the last unused one, is at the end."""
    positions = {name: number for number, name in enumerate(names)}
    uses = {number: {positions[stage] for stage in stages_of(each)} for number, each in enumerate(read)}
    try:
        order = list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        cycle = " → ".join(str(names[number]) for number in error.args[1])
        raise RecipeError(f"Documents of the configuration use each other's results: {cycle}") from None
    used = set[int]().union(*uses.values())
    last = positions.get(None)
    if last is None:
        last = max(number for number in range(len(read)) if number not in used)
    return tuple(read[number] for number in [*(each for each in order if each != last), last])


def stages_of(configuration: Configuration) -> tuple[str, ...]:
    """The names of the documents whose results a configuration uses."""
    parts = [part for each in configuration.references for part in each.parts]
    return tuple(dict.fromkeys(part.name for part in parts if isinstance(part, Stage)))
