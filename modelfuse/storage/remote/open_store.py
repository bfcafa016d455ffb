"""Which store holds a URL."""

from __future__ import annotations

import threading

from modelfuse.errors import CheckpointError, MissingExtraError
from modelfuse.storage.remote.errors import told
from modelfuse.storage.remote.s3_and_http import HttpStore, S3Store
from modelfuse.storage.remote.stores import CONNECTIONS, Store
from modelfuse.storage.url import Url

#: The extra that brings the package for a scheme, or the package.
EXTRAS = {"s3": "modelfuse[s3]", "http": "modelfuse[remote]", "https": "modelfuse[remote]",
          "gs": "gcsfs", "hdfs": "pyarrow", "abfs": "adlfs", "az": "adlfs"}  # fmt: skip


def store_of(url: Url) -> Store:
    """The store that holds a URL; one for each kind and server.

    Raises:
        MissingExtraError: If the package that reads such stores is not installed.
        CheckpointError: If there is no such kind of store, or it cannot be used.
    """
    # A bucket is part of a name; a server is not.
    server = f"{url.user}{url.host}" if url.scheme not in ("s3", "gs") else ""
    with _LOCK:
        found = _STORES.get((url.scheme, server))
        if found is None:
            found = _STORES[url.scheme, server] = _open(url)
        return found


_STORES: dict[tuple[str, str], Store] = {}
_LOCK = threading.Lock()


def forget(*, connections: bool = False) -> None:
    """Ask all stores anew: what they hold may have changed.

    Args:
        connections: Whether to read fsspec's configuration and the environment anew, too.
    """
    with _LOCK:
        for store in _STORES.values():
            store.forget()
        if connections:
            _STORES.clear()


def _open(url: Url) -> Store:
    extra = EXTRAS.get(url.scheme, "modelfuse[remote]")
    try:
        import fsspec
    except ImportError as error:
        raise _missing(url, extra) from error
    options: dict[str, object] = {"skip_instance_cache": True, "use_listings_cache": False}
    if url.scheme == "s3":
        known = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        # Requests are tried again here, those of every store alike.
        ours = {"max_pool_connections": CONNECTIONS, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {**ours, **known}
    try:
        fs, _ = fsspec.core.url_to_fs(url.address, **options)
    except ImportError as error:
        raise _missing(url, extra, str(error)) from error
    except Exception as error:
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise CheckpointError(
                f"{url}: there is no kind of store that is called {url.scheme}",
                f"Known are {', '.join(sorted(EXTRAS))}, and all others that fsspec knows.",
            ) from error
        raise told(url, error) from error
    kinds: dict[str, type[Store]] = {"s3": S3Store, "http": HttpStore, "https": HttpStore}
    return kinds.get(url.scheme, Store)(fs)


def _missing(url: Url, extra: str, why: str = "") -> MissingExtraError:
    return MissingExtraError(
        f"{url} needs {extra}, which is not installed{f': {why}' if why else ''}", f"pip install '{extra}'"
    )
