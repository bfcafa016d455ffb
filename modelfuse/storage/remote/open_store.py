"""Open and configure the store of a URL."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from modelfuse.errors import CheckpointError, MissingExtraError
from modelfuse.storage.named_hosts import is_named
from modelfuse.storage.remote.errors import NoCredentials, told
from modelfuse.storage.remote.settings import Profile, fsspec_settings
from modelfuse.storage.remote.stores import Store
from modelfuse.storage.remote.threads import share_heaps
from modelfuse.storage.url import AZURE, Url

#: The packages that fsspec needs, by scheme.
PACKAGES = {"hdfs": "pyarrow", "webhdfs": "requests", "sftp": "paramiko", "smb": "smbprotocol", "oss": "ossfs"}
#: Headers that the library drops when it follows a redirect to another server.
SAFE_HEADERS = ("authorization", "cookie")
#: Variables that tell machines of Amazon where their credentials are.
CONTAINERS = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
              "AWS_CONTAINER_CREDENTIALS_FULL_URI")  # fmt: skip
#: Domains of Azure's accounts.
ACCOUNTS = tuple(
    f".{kind}.{domain}" for kind in ("dfs", "blob") for domain in ("core.windows.net", "fabric.microsoft.com")
)


def store_of(url: Url) -> Store:
    """The store of a URL; cached for each bucket or server.

    Raises:
        MissingExtraError: If the package for such stores is not installed.
        CheckpointError: If the store cannot be opened.
    """
    server = url.scheme, url.user, url.host, url.query
    with _LOCK:
        found = _STORES.get(server)
        if found is None:
            found = _STORES[server] = _open(url)
        return found


_STORES: dict[tuple[str, ...], Store] = {}
_LOCK = threading.Lock()


def forget(*, connections: bool = False) -> None:
    """Drop cached listings of all stores, as they may have changed.

    Args:
        connections: Whether to drop the stores too, so that configuration and environment are read again.
    """
    with _LOCK:
        for store in _STORES.values():
            store.forget()
        if connections:
            _STORES.clear()


def _open(url: Url) -> Store:
    share_heaps()
    openers = {"s3": _s3, "gs": _google, "http": _web, "https": _web, **dict.fromkeys(AZURE, _azure)}
    try:
        return openers.get(url.scheme, _other)(url)
    except ImportError as error:
        raise _missing(url, "modelfuse[remote]") from error
    except MissingExtraError:
        raise
    except Exception as error:
        raise told(url, error) from error


def _s3(url: Url) -> Store:
    from obstore.store import S3Store

    from modelfuse.storage.remote.object_stores import S3Bucket, connecting

    settings = fsspec_settings("s3", "s3a")
    client = settings.get("client_kwargs", {})
    profile = Profile(settings.get("profile"))
    config: dict[str, Any] = {
        "region": client.get("region_name") or _environment("AWS_REGION", "AWS_DEFAULT_REGION")
        or profile.get("region") or "us-east-1",
        "aws_endpoint_url_s3": settings.get("endpoint_url") or client.get("endpoint_url")
        or _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") or profile.get("endpoint_url"),
        "disable_bulk_delete": True,  # Not every store supports bulk deletes.
    }  # fmt: skip
    if _is_on(settings.get("requester_pays")):
        config["request_payer"] = True
    style = settings.get("config_kwargs", {}).get("s3", {}).get("addressing_style")
    if style == "virtual" and (endpoint := config["aws_endpoint_url_s3"]):
        config["aws_endpoint_url_s3"] = endpoint.replace("://", f"://{url.host}.", 1)
        config["virtual_hosted_style_request"] = True
    credentials = _of_s3(settings, profile, config)
    config = {key: value for key, value in config.items() if value is not None}
    more: dict[str, Any] = {"allow_http": str(config.get("aws_endpoint_url_s3")).startswith("http:")}
    verify = client.get("verify") or _environment("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE") or profile.get("ca_bundle")
    if client.get("verify") is False:
        more["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        more["root_certificate"] = _certificate(verify)
    return S3Bucket(S3Store, url.host, config, connecting(**more), credentials)


def _of_s3(settings: dict[str, Any], profile: Profile, config: dict[str, Any]) -> Any:
    """Set credentials in a configuration, or return a credential provider.

    Raises:
        NoCredentials: If there are none, and machine credentials may not be used.
    """
    if _is_on(settings.get("anon")) or _is_on(_environment("AWS_SKIP_SIGNATURE")):
        config["skip_signature"] = True
        return None
    names = {"access_key_id": "key", "secret_access_key": "secret", "session_token": "token"}
    if settings.get("key"):
        config |= {ours: settings.get(theirs) for ours, theirs in names.items()}
    elif not _environment("AWS_ACCESS_KEY_ID"):
        if profile.get("aws_access_key_id"):
            config |= {ours: profile.get(f"aws_{ours}") for ours in names}
            return None
        found = profile.credentials()
        if found is None and not _environment(*CONTAINERS) and _is_on(_environment("AWS_EC2_METADATA_DISABLED")):
            raise NoCredentials
        return found
    return None


def _google(url: Url) -> Store:
    from obstore.store import GCSStore

    from modelfuse.storage.remote.object_stores import Bucket, connecting

    settings, config = fsspec_settings("gs", "gcs"), dict[str, Any]()
    token = settings.get("token")
    if token == "anon":
        config["skip_signature"] = True
    elif isinstance(token, str) and Path(token).expanduser().is_file():
        config["application_credentials"] = str(Path(token).expanduser())
    is_plain = (_environment("GOOGLE_BASE_URL") or "").startswith("http:")
    return Bucket(GCSStore, url.host, config, connecting(allow_http=is_plain))


def _azure(url: Url) -> Store:
    from obstore.store import AzureStore

    from modelfuse.storage.remote.object_stores import Bucket, connecting

    settings, config = fsspec_settings(*AZURE), dict[str, Any]()
    container, at, account = url.host.partition("@")
    if at:
        name, dot, domain = account.partition(".")
        if f"{dot}{domain}" not in ACCOUNTS:  # Credentials are sent there.
            raise CheckpointError(f"{url}: {account} is not an account of Azure", f"Write it as account{ACCOUNTS[0]}.")
        config["account_name"] = name
        config["use_fabric_endpoint"] = "fabric" in domain
    elif settings.get("account_name"):
        config["account_name"] = settings["account_name"]
    config |= {key: settings[key] for key in ("account_key", "sas_token", "tenant_id", "client_id", "client_secret")
               if settings.get(key)}  # fmt: skip
    if _is_on(settings.get("anon")):
        config["skip_signature"] = True
    endpoint = _environment("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT") or ""
    is_plain = endpoint.startswith("http:") or _is_on(_environment("AZURE_STORAGE_USE_EMULATOR"))
    return Bucket(AzureStore, container, config, connecting(allow_http=is_plain))


def _web(url: Url) -> Store:
    from modelfuse.storage.remote.web import WebStore

    settings = fsspec_settings(url.scheme)
    headers = {**settings.get("headers", {}), **settings.get("client_kwargs", {}).get("headers", {})}
    if unsafe := [name for name in headers if name.lower() not in SAFE_HEADERS]:
        raise CheckpointError(
            f"The header {unsafe[0]} of fsspec's configuration cannot be sent: redirects take it to other servers",
            "Only Authorization and Cookie are dropped at redirects.",
        )
    # Configured headers are for all servers, so they are not sent to servers that only a file names.
    return WebStore(url, headers if is_named(url) else {}, {})


def _other(url: Url) -> Store:
    packages = ("fsspec", *((PACKAGES[url.scheme],) if url.scheme in PACKAGES else ()))
    try:
        import fsspec
    except ImportError as error:
        raise _missing(url, *packages) from error
    from modelfuse.storage.remote.fsspec_store import FsspecStore

    try:
        fs, _ = fsspec.core.url_to_fs(url.address, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise _missing(url, *packages[::-1]) from error
    return FsspecStore(fs)


def _environment(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _is_on(value: object) -> bool:
    return str(value).lower() in ("true", "1", "yes", "requester")


def _certificate(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "AWS_CA_BUNDLE names a file of certificates.") from error


def _missing(url: Url, package: str, *others: str) -> MissingExtraError:
    hint = " ".join(f"'{each}'" for each in (package, *others))
    return MissingExtraError(f"{url} needs {package}, which is not installed", f"pip install {hint}")
