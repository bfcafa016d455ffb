"""Resolve hub names: the commit, the files that the merge needs, and which of them are not in the cache."""

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
from modelfuse.planning.hub.needed_files import NeededFiles, needed_files
from modelfuse.planning.hub.parallel_jobs import StopFlag, run_parallel
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.recipe import Recipe

#: The most files that an error names.
MOST_NAMED = 3


@dataclass(frozen=True)
class HubModel:
    """A model on a hub whose files are known.

    Attributes:
        name: Its name in the recipe.
        pinned: The name with the commit, and the folder of its files in the cache.
        files: The files that the merge needs.
        sizes: The sizes of all its files in bytes.
    """

    name: HubName
    pinned: HubName
    files: NeededFiles
    sizes: dict[str, int]

    @property
    def folder(self) -> Path:
        """The folder of its files in the cache, which may not exist yet."""
        assert self.pinned.folder is not None
        return self.pinned.folder

    @property
    def missing(self) -> list[str]:
        """The needed files that are not in the cache."""
        return [file for file in self.files.all if not (self.folder / file).exists()]

    @property
    def missing_bytes(self) -> int:
        """The size of the missing files in bytes."""
        return sum(self.sizes[file] for file in self.missing)


@dataclass(frozen=True)
class ModelFinder:
    """Finds the models of a recipe on a hub, or in the cache.

    Args:
        hub: The hub.
        recipe: The merge.
        tell: Called with a note if a cached copy is used.
    """

    hub: Hub
    recipe: Recipe
    tell: Callable[[str], None]

    def find(self, *, ask: bool = True) -> list[HubModel]:
        """Find all models, concurrently.

        Args:
            ask: Whether to ask the hub, or to use the cache only.

        Raises:
            HubError: If a model does not exist, or the hub does not answer and the cache has no complete copy.
        """

        def job(name: HubName) -> Callable[[StopFlag], HubModel]:
            return lambda _: self._find(name) if ask else self._find_cached(name)

        return run_parallel(job(name) for name in self.recipe.hub_names)

    def _find(self, name: HubName) -> HubModel:
        if name.commit is not None and known_files(name) is not None:  # A commit never changes.
            try:
                return self._cached(name)
            except HubError:
                pass
        try:
            commit, sizes = self.hub.list_files(name)
            pinned = self._pinned(name, commit)
            remember_files(pinned, sizes)
            return self._model(name, pinned, sizes, lambda file: self.hub.fetch(pinned, file, SilentBar))
        except UnreachableError as failure:
            return self._fall_back(name, failure)

    def _fall_back(self, name: HubName, failure: UnreachableError) -> HubModel:
        """The cached copy, if the hub does not answer."""
        try:
            model = self._cached(name)
        except HubError as lacking:
            raise HubError(f"{failure.message}, and {lacking.message}", lacking.hint) from failure
        if not self.hub.offline:
            self.tell(f"{failure.message}; the cached copy of {model.pinned} is used.")
        return model

    def _find_cached(self, name: HubName) -> HubModel:
        """The cached copy, if the hub must not be asked."""
        try:
            return self._cached(name)
        except HubError as lacking:
            raise HubError(f"{name} is not in the cache: {lacking.message}", lacking.hint) from lacking

    def _cached(self, name: HubName) -> HubModel:
        """The copy in the cache, if it has all files that the merge needs."""
        commit = known_commit(self.hub.cache, name)
        pinned = self._pinned(name, commit or "")
        known = None if commit is None else known_files(pinned)
        sizes = known or ({} if commit is None else files_there(snapshot(self.hub.cache, pinned)))
        if not sizes:
            raise self._lacking(name, "the cache has no copy of it")
        try:
            model = self._model(name, pinned, sizes, self._in(pinned))
        except HubError:
            raise
        except CheckpointError as error:
            raise self._lacking(name, f"the cached copy is incomplete: {error.message}") from error
        if missing := model.missing:
            more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            listed = ", ".join(missing[:MOST_NAMED]) + more
            raise self._lacking(name, f"the cached copy is incomplete, without {listed}")
        if known is None:
            self.tell(
                f"{pinned} is used from the cache, which has no list of its files: some beside the weights, such as "
                "the tokenizer's, may be missing."
            )
        return model

    def _in(self, pinned: HubName) -> Callable[[str], Path]:
        def get(file: str) -> Path:
            path = snapshot(self.hub.cache, pinned) / file
            if not path.exists():
                raise self._lacking(pinned, f"the cached copy is incomplete, without {file}")
            return path

        return get

    def _lacking(self, name: HubName, what: str) -> HubError:
        revision = "" if name.revision is None else f" --revision {name.revision}"
        return HubError(
            what + f" (in {self.hub.cache})",
            f"With access to the hub: hf download {name.name}{revision}. If you meant a folder: there is no {name} "
            "here.",
        )

    def _pinned(self, name: HubName, commit: str) -> HubName:
        pinned = HubName(name.name, commit)
        return replace(pinned, folder=snapshot(self.hub.cache, pinned))

    def _model(self, name: HubName, pinned: HubName, sizes: dict[str, int], get: Callable[[str], Path]) -> HubModel:
        return HubModel(name, pinned, needed_files(self.recipe, name, pinned, sizes, get), sizes)

    def keep(self, models: list[HubModel]) -> None:
        """Store the commits of the revisions, after all files were fetched."""
        for model in models:
            remember_commit(self.hub.cache, model.name, str(model.pinned.revision))


class SilentBar:
    """A class to use instead of tqdm that shows nothing; it has the methods that huggingface_hub calls."""

    def __init__(self, *args: object, **options: object) -> None:
        """Nothing is shown."""

    def __enter__(self) -> SilentBar:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def update(self, more: float | None = 1) -> None:
        """``more`` bytes were written to the disk."""

    def update_transfer(self, more: float | None = 1) -> None:
        """``more`` bytes were received."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Show the speed."""

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Show the speed of the network."""

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass
