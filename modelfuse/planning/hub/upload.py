"""Upload an output to a hub with huggingface_hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelfuse.checkpoints.made_files import CONFIG_NAME, REPORT_NAME
from modelfuse.errors import CheckpointError, HubError, MissingExtraError, RecipeError
from modelfuse.recipe.hub_names import HubName, hub_name
from modelfuse.version import __version__

#: Files that a new repository may have.
FIRST_FILES = {".gitattributes", "README.md", "LICENSE"}
#: Files that --overwrite deletes from the repository if the output does not have them.
WEIGHTS = ["*.safetensors", "*.bin", "*.pdparams", "*.index.json"]
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."


@dataclass(frozen=True, slots=True)
class Pushed:
    """An uploaded output.

    Attributes:
        name: ``organization/model``.
        url: The URL of its page.
        commit: The commit.
        private: Whether the repository is private.
    """

    name: str
    url: str
    commit: str
    private: bool


def push_folder(
    folder: Path,
    name: str,
    *,
    public: bool = False,
    overwrite: bool = False,
    endpoint: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Pushed:
    """Upload an output to a hub.

    Args:
        folder: The output of a merge.
        name: ``organization/model``, with ``@branch`` for another branch than the main one.
        public: Whether a new repository is public; else it is private.
        overwrite: Whether to replace the weights of a repository that has files.
        endpoint: The hub's URL; None for huggingface_hub's default.
        tell: Called with a note for the user.

    Raises:
        CheckpointError: If the folder is not the output of a merge.
        HubError: If the hub refuses it or does not answer.
        MissingExtraError: If huggingface_hub is not installed.
        RecipeError: If the name is not a hub name.
    """
    target = _target(folder, name)
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingExtraError(
            "Uploading a model to a hub needs huggingface_hub, which is not installed", "pip install 'modelfuse[hub]'"
        ) from error
    api = HfApi(endpoint=endpoint, library_name="modelfuse", library_version=__version__)
    if local := _local_inputs(folder):
        tell(
            f"{REPORT_NAME} and {CONFIG_NAME} contain the inputs' local paths, such as {local[0]}; everybody who can "
            "see the model can see them."
        )
    with _explained(target, api.endpoint):
        private = _prepare(api, target, public, overwrite, tell)
        done: Any = api.upload_folder(
            repo_id=target.name,
            folder_path=folder,
            revision=target.revision,
            commit_message=f"Merged with modelfuse {__version__}",
            ignore_patterns=[".*"],
            delete_patterns=WEIGHTS if overwrite else None,
        )
    url = f"{api.endpoint}/{target.name}" + (f"/tree/{target.revision}" if target.revision else "")
    return Pushed(str(target), url, done.oid, private)


def _prepare(api: Any, target: HubName, public: bool, overwrite: bool, tell: Callable[[str], None]) -> bool:
    """Create the repository and branch if needed, and check that nothing is replaced without ``overwrite``.

    Returns:
        Whether the repository is private.
    """
    api.create_repo(target.name, private=not public, exist_ok=True)
    before = api.model_info(target.name, files_metadata=False)
    files = {each.rfilename for each in before.siblings or ()}
    if files - FIRST_FILES and not overwrite:
        raise HubError(
            f"{target.name} has {len(files)} files already, such as {min(files - FIRST_FILES)}",
            "Add --overwrite to replace its weights, or give another name.",
        )
    if target.revision is not None:
        api.create_branch(target.name, branch=target.revision, exist_ok=True)
    if before.private == public:
        tell(f"{target.name} is {'private' if before.private else 'public'} and stays so.")
    return bool(before.private)


def _target(folder: Path, name: str) -> HubName:
    target = hub_name(name)
    if target is None:
        raise RecipeError(f"{name!r} is not a name of a model on a hub", "Give it as organization/model.")
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}", "Give the output_path of a merge.")
    if not (folder / REPORT_NAME).is_file():
        raise CheckpointError(
            f"{folder} is not the output of a merge: it has no {REPORT_NAME}",
            f"To upload another folder: `hf upload {name} {folder}`.",
        )
    return target


def _local_inputs(folder: Path) -> list[str]:
    """The local paths among the report's inputs."""
    try:
        inputs = json.loads((folder / REPORT_NAME).read_bytes())["inputs"]
        return [each["path"] for each in inputs if each["path"].startswith("/")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / REPORT_NAME} is not a valid report", "It was edited or damaged; merge again."
        ) from error


@contextmanager
def _explained(target: HubName, endpoint: str) -> Iterator[None]:
    """Translate errors of the library and its HTTP client."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"{target.name} cannot be written without a token", LOG_IN) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise HubError(f"{target.name} may not be written at {endpoint} ({status})", LOG_IN) from error
        reason = getattr(error, "server_message", None) or str(error).partition("\n")[0]
        raise HubError(f"{target.name} cannot be written at {endpoint}: {reason}") from error
    except (*errors.HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise HubError(f"{target.name} cannot be written at {endpoint}: {reason}", "Try again later.") from error
