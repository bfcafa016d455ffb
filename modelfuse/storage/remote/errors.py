"""What the libraries of stores raise, told apart without importing them, and in our words."""

from __future__ import annotations

from collections.abc import Iterator

from modelfuse.errors import CheckpointError, ModelfuseError
from modelfuse.storage.url import Url

#: Answers that another attempt may change.
PASSING = (408, 429, 500, 502, 503, 504)
#: Names of exceptions of botocore and aiohttp, or what they are derived from, that speak of the way to the server.
WAYS = {"ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "IncompleteRead",
        "IncompleteReadError", "ResponseParserError", "TimeoutError", "FSTimeoutError"}  # fmt: skip
#: The same where there is no server at all.
UNREACHED = {
    "EndpointConnectionError",
    "ClientConnectorError",
    "ConnectionRefusedError",
    "gaierror",
    "ConnectTimeoutError",
}
CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError",
               "CredentialRetrievalError", "NoAuthTokenError", "UnauthorizedSSOTokenError"}  # fmt: skip
NEXT = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket "
    "FSSPEC_S3='{\"anon\": true}'.",
    "gs": "Log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS.",
}


class Cut(Exception):
    """Raised where fewer bytes came than were asked for."""


class Replaced(Exception):
    """Raised where the object is no longer the one that was looked at."""


class Unranged(Exception):
    """Raised where a server sends whole files only."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def kinds(error: BaseException) -> set[str]:
    """The names of its classes and of those it was raised from."""
    return {cls.__name__ for each in chain(error) for cls in type(each).__mro__}


def answer(error: BaseException) -> tuple[int, str]:
    """The server's status and its own code; zero and nothing if there was no answer."""
    for each in chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        for name in ("status", "code"):  # aiohttp's; gcsfs's
            status = getattr(each, name, None)
            if isinstance(status, int):
                return status, ""
    return 0, ""


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    status, code = answer(error)
    if status >= 400:
        return status in PASSING or code in ("SlowDown", "RequestTimeout", "InternalError")
    return isinstance(error, Cut | ConnectionError | TimeoutError) or bool(kinds(error) & WAYS)


def is_missing(error: BaseException) -> bool:
    """Whether there is nothing of that name."""
    return answer(error)[0] in (404, 410) or isinstance(error, FileNotFoundError)


def told(url: Url, error: BaseException, kind: type[ModelfuseError] = CheckpointError) -> BaseException:
    """The error to raise for what a store's library has raised; a bug stays what it is."""
    if isinstance(error, ModelfuseError | LookupError | AttributeError | TypeError | NameError | AssertionError):
        return error
    (status, code), names = answer(error), kinds(error)
    if isinstance(error, Replaced) or status == 412:
        return kind(
            f"{url} was changed while it was being read", "Wait until nothing writes to it any more, then merge again."
        )
    if isinstance(error, Unranged):
        return kind(f"{url} can only be fetched whole: its server ignores ranges", "Download it, and name the folder.")
    if code == "NoSuchBucket":
        return kind(f"{url}: there is no bucket {url.host}", "Check the URL, and the endpoint that is used.")
    if is_missing(error):
        return kind(f"{url} is missing", "Check the URL.")
    if names & CREDENTIALS:
        return kind(f"{url} cannot be reached without credentials, and none are found", NEXT.get(url.scheme))
    if status in (401, 403) or "PermissionError" in names:
        what = code or f"status {status}" if status else str(error)
        return kind(f"{url}: access is denied ({what})", NEXT.get(url.scheme, "Check the credentials in the URL."))
    return _way(url, error, kind)


def _way(url: Url, error: BaseException, kind: type[ModelfuseError]) -> ModelfuseError:
    """The error for a server that cannot be reached, or not be talked to."""
    status, code = answer(error)
    setting = "FSSPEC_S3_ENDPOINT_URL or AWS_ENDPOINT_URL, if it is not AWS" if url.scheme == "s3" else "the URL"
    if kinds(error) & UNREACHED:
        return kind(f"{url}: the server cannot be reached: {_short(error)}", f"Check the network and {setting}.")
    if isinstance(error, TimeoutError) or "FSTimeoutError" in kinds(error):
        return kind(f"{url}: the server did not answer in time", f"Check the network and {setting}; then try again.")
    if status:
        return kind(
            f"{url}: the server answered with status {status}{f' ({code})' if code else ''}",
            "Try again." if status in PASSING else f"Check {setting}.",
        )
    return kind(f"{url}: {_short(error)}", "Try again." if is_passing(error) else None)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
