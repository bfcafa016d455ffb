"""Where hub names lead: the commit, the files that the merge needs, and which of them the cache lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from modelfuse.errors import CheckpointError, HubError
from modelfuse.planning.hub.cache import (
    files_there,
    known_commit,
    known_files,
    remember_commit,
    remember_files,
    snapshot,
)
from modelfuse.planning.hub.client import Hub, UnreachableError
from modelfuse.planning.hub.needed_files import Wanted, wanted
from modelfuse.planning.hub.parallel_jobs import Stop, together
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.recipe import Recipe

#: Files that are named one by one in an error.
MOST_NAMED = 3


@dataclass(frozen=True)
class Model:
    """A model whose files are known.

    Attributes:
        name: As the recipe names it.
        place: The same with its commit, and the folder of its files in the cache.
        files: Those that the merge needs.
        sizes: The sizes of all files.
    """

    name: HubName
    place: HubName
    files: Wanted
    sizes: dict[str, int]

    @property
    def folder(self) -> Path:
        """Where its files are, or will be."""
        assert self.place.folder is not None
        return self.place.folder

    @property
    def missing(self) -> list[str]:
        """The files that are needed and not in the cache."""
        return [file for file in self.files.all if not (self.folder / file).exists()]

    @property
    def missing_bytes(self) -> int:
        """Their size."""
        return sum(self.sizes[file] for file in self.missing)


@dataclass(frozen=True)
class Finder:
    """Looks hub names up.

    Args:
        hub: Where.
        recipe: For which merge.
        tell: Called with a sentence where the cache stands in for the hub.
    """

    hub: Hub
    recipe: Recipe
    tell: Callable[[str], None]

    def find(self, *, ask: bool = True) -> list[Model]:
        """Look all models up at once.

        Args:
            ask: Whether to ask the hub; without, the cache must do.

        Raises:
            HubError: If a model is not there, or the hub cannot be asked and the cache holds no complete copy.
        """

        def job(name: HubName) -> Callable[[Stop], Model]:
            return lambda _: self._find(name) if ask else self._at_hand(name)

        return together(job(name) for name in self.recipe.hub_names)

    def _find(self, name: HubName) -> Model:
        if name.commit is not None and known_files(name) is not None:  # A commit never changes.
            try:
                return self._cached(name)
            except HubError:
                pass
        try:
            commit, sizes = self.hub.list_files(name)
            place = self._place(name, commit)
            remember_files(place, sizes)
            return self._model(name, place, sizes, lambda file: self.hub.fetch(place, file, Silent))
        except UnreachableError as failure:
            return self._instead(name, failure)

    def _instead(self, name: HubName, failure: UnreachableError) -> Model:
        """The cached copy, if the hub cannot be asked."""
        try:
            model = self._cached(name)
        except HubError as lacking:
            raise HubError(f"{failure.message}, and {lacking.message}", lacking.hint) from failure
        if not self.hub.offline:
            self.tell(f"{failure.message}; the cached copy of {model.place} is taken.")
        return model

    def _at_hand(self, name: HubName) -> Model:
        """The cached copy, where the hub is not to be asked."""
        try:
            return self._cached(name)
        except HubError as lacking:
            raise HubError(f"{name} is not at hand: {lacking.message}", lacking.hint) from lacking

    def _cached(self, name: HubName) -> Model:
        """The copy in the cache, if the merge finds in it all that it needs."""
        commit = known_commit(self.hub.cache, name)
        place = self._place(name, commit or "")
        known = None if commit is None else known_files(place)
        sizes = known or ({} if commit is None else files_there(snapshot(self.hub.cache, place)))
        if not sizes:
            raise self._lacking(name, "the cache holds no copy of it")
        try:
            model = self._model(name, place, sizes, self._in(place))
        except HubError:
            raise
        except CheckpointError as error:
            raise self._lacking(name, f"the cache holds only a part of it: {error.message}") from error
        if missing := model.missing:
            more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            listed = ", ".join(missing[:MOST_NAMED]) + more
            raise self._lacking(name, f"the cache holds only a part of it, without {listed}")
        if known is None:
            self.tell(
                f"{place} is taken from the cache, which does not know all of its files: some beside the weights, "
                "such as a tokenizer's, may be missing."
            )
        return model

    def _in(self, place: HubName) -> Callable[[str], Path]:
        def get(file: str) -> Path:
            path = snapshot(self.hub.cache, place) / file
            if not path.exists():
                raise self._lacking(place, f"the cache holds only a part of it, without {file}")
            return path

        return get

    def _lacking(self, name: HubName, what: str) -> HubError:
        revision = "" if name.revision is None else f" --revision {name.revision}"
        return HubError(
            what + f" (in {self.hub.cache})",
            f"Where the hub can be reached: hf download {name.name}{revision}. If a folder was meant: there is no "
            f"{name} here.",
        )

    def _place(self, name: HubName, commit: str) -> HubName:
        place = HubName(name.name, commit)
        return replace(place, folder=snapshot(self.hub.cache, place))

    def _model(self, name: HubName, place: HubName, sizes: dict[str, int], get: Callable[[str], Path]) -> Model:
        return Model(name, place, wanted(self.recipe, name, place, sizes, get), sizes)

    def keep(self, models: list[Model]) -> None:
        """Remember where the revisions are, now that all files are in the cache."""
        for model in models:
            remember_commit(self.hub.cache, model.name, str(model.place.revision))


class Silent:
    """Takes the place of tqdm where nothing is shown; huggingface_hub calls no more than this of it."""

    def __init__(self, *args: object, **options: object) -> None:
        """Nothing is shown."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def update(self, more: float | None = 1) -> None:
        """So many bytes more are on the disk."""

    def update_transfer(self, more: float | None = 1) -> None:
        """So many bytes more have come over the network."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """The speed, in words."""

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        """The same of the network."""

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass
