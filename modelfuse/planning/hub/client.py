"""Client of a hub: the functions of huggingface_hub that a merge needs, with helpful errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelfuse.errors import HubError, MissingExtraError
from modelfuse.recipe.hub_names import HubName
from modelfuse.version import __version__

#: Timeout in seconds for connecting, and for each read.
TIMEOUT = 10.0
#: Bytes between two checks for an interruption.
CHUNK = 1 << 18
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
#: Statuses of a hub that is temporarily unable to answer.
BUSY = (408, 429)


class UnreachableError(HubError):
    """Raised if a hub does not answer or is temporarily unavailable; a cached copy may be used instead."""


class Hub:
    """A hub and its cache.

    Args:
        endpoint: Its URL; None for huggingface_hub's default.
        name: A requested model, for the error message.
        anonymous: Whether to send no token, even if one is stored.

    Raises:
        MissingExtraError: If huggingface_hub is not installed.
    """

    def __init__(self, endpoint: str | None, name: HubName, anonymous: bool = False) -> None:
        try:
            from huggingface_hub import HfApi, constants
        except ImportError as error:
            raise MissingExtraError(
                f"There is no folder {name} here, and fetching it from a hub needs huggingface_hub, which is not "
                "installed",
                "pip install 'modelfuse[hub]'",
            ) from error
        self._given = endpoint
        self.endpoint = endpoint or constants.ENDPOINT
        self.offline: bool = constants.HF_HUB_OFFLINE
        self.cache = Path(constants.HF_HUB_CACHE).absolute()
        #: huggingface_hub's argument: None for the stored token, False for none.
        self._token: bool | None = False if anonymous else None
        self._api = HfApi(endpoint=endpoint, token=self._token, library_name="modelfuse", library_version=__version__)

    def configure_library(self) -> None:
        """Silence the library's own output, unless HF_HUB_VERBOSITY is set, and have it check more often for a stop."""
        from huggingface_hub import constants
        from huggingface_hub.utils import logging

        constants.DOWNLOAD_CHUNK_SIZE = CHUNK
        if "HF_HUB_VERBOSITY" not in os.environ:
            logging.set_verbosity_error()

    def list_files(self, name: HubName) -> tuple[str, dict[str, int]]:
        """The commit of a model's revision, and the sizes in bytes of all its files."""
        with self._explained(name):
            info = self._api.model_info(name.name, revision=name.revision, files_metadata=True, timeout=TIMEOUT)
            files: dict[str, int] = {each.rfilename: each.size for each in info.siblings or ()}
            # These become local file names and sizes.
            if HubName(name.name, info.sha).commit is None or not all(map(_is_file, files.items())):
                raise ValueError("its answer lacks the commit, or file names or sizes")
            return info.sha, files

    def fetch(self, name: HubName, file: str, bar: type | None) -> Path:
        """Fetch one file of a model into the cache, unless it is there.

        Args:
            name: The model with its commit.
            file: The file's name.
            bar: A class to use instead of tqdm; None for huggingface_hub's own progress bars.
        """
        from huggingface_hub import hf_hub_download

        with self._explained(name, file):
            path: str = hf_hub_download(
                name.name, file, revision=name.revision, endpoint=self._given, cache_dir=self.cache, tqdm_class=bar,
                token=self._token, library_name="modelfuse", library_version=__version__,
            )  # fmt: skip
            return Path(path)

    def read_start(self, name: HubName, file: str, count: int) -> bytes:
        """Read the first ``count`` bytes of a file, or the whole file if it is shorter."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(name.name, file, revision=name.revision, endpoint=self._given)
        headers = build_hf_headers(token=self._token, library_name="modelfuse", library_version=__version__)
        # A range of a compressed body would have other bytes.
        headers |= {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        with self._explained(name, file), get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as answer:
            hf_raise_for_status(answer)
            start = bytearray()
            for piece in answer.iter_bytes():
                start += piece
                if len(start) >= count:  # A server without ranges sends the whole file.
                    break
            return bytes(start[:count])

    @contextmanager
    def _explained(self, name: HubName, file: str | None = None) -> Iterator[None]:
        """Translate errors of the library, its HTTP client, and malformed answers."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        # The bases are those of the HTTP library; Xet raises RuntimeError.
        except (*HfHubHTTPError.__bases__, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._explain(name, file, error) from error

    def _explain(self, name: HubName, file: str | None, error: BaseException) -> HubError:
        from huggingface_hub import errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            return self._explain(name, file, error.__cause__)
        what = f"{file} of {name}" if file else str(name)
        table: Mapping[type, Callable[[], HubError]] = {
            errors.OfflineModeIsEnabled: lambda: UnreachableError(f"{what} cannot be fetched: HF_HUB_OFFLINE is set"),
            errors.GatedRepoError: lambda: HubError(
                f"{name.name} is gated: its owner must grant you access",
                f"Ask for access at {self.endpoint}/{name.name}, then {LOG_IN}.",
            ),
            errors.RevisionNotFoundError: lambda: HubError(
                f"{name.name} has no revision {name.revision or 'main'} at {self.endpoint}",
                "Give a branch, a tag or a commit after @.",
            ),
            errors.RepositoryNotFoundError: lambda: self._nowhere(name),
            errors.EntryNotFoundError: lambda: HubError(f"{name} has no {file} at {self.endpoint}"),
            errors.HfHubHTTPError: lambda: self._refused(name, what, error),
        }
        for kind, explain in table.items():
            if isinstance(error, kind):
                return explain()
        of_network = isinstance(error, ConnectionError | TimeoutError)
        if isinstance(error, OSError) and error.errno is not None and not of_network:
            return self._cannot_store(what, error)
        return UnreachableError(f"{what} cannot be fetched from {self.endpoint}: {_reason(error)}")

    def _nowhere(self, name: HubName) -> HubError:
        return HubError(
            f"There is no folder {name.name} here, and no model of that name at {self.endpoint}",
            f"Check the name. If the model is private, {LOG_IN}.",
        )

    def _refused(self, name: HubName, what: str, error: Any) -> HubError:
        status = error.response.status_code
        if status == 404:
            return self._nowhere(name)
        if status >= 500 or status in BUSY:
            return UnreachableError(f"{what} cannot be fetched from {self.endpoint}: status {status}")
        if status in (401, 403):
            return HubError(
                f"{self.endpoint} refuses {what} (status {status}): {_reason(error)}",
                f"Check your token and its permissions; {LOG_IN}.",
            )
        return HubError(f"{what} cannot be fetched from {self.endpoint}: {_reason(error)}")

    def _cannot_store(self, what: str, error: OSError) -> HubError:
        hint = "Set HF_HOME to another folder for the cache, or free some space."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return HubError(f"{what} does not fit on the disk of the cache {self.cache}", hint)
        return HubError(f"{what} cannot be stored in the cache: {error.filename or self.cache}: {error.strerror}", hint)


def _is_file(entry: tuple[object, object]) -> bool:
    name, size = entry
    return isinstance(name, str) and "\0" not in name and type(size) is int and 0 <= size < 2**63


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
