"""Classify exceptions of the stores' libraries, without importing these, and translate them to our errors.

The libraries' messages contain whole URLs, with users, passwords and signatures. Of obstore's errors, only the status,
the store's code and the kind of failure are used; nothing else is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from modelfuse.errors import CheckpointError, ModelfuseError
from modelfuse.storage.url import AZURE, Url

#: Status codes after which a retry may succeed.
PASSING = (408, 429, 500, 502, 503, 504)
#: S3's error codes after which a retry may succeed, whatever the status.
PASSING_CODES = ("SlowDown", "RequestTimeout", "InternalError")
#: obstore's kinds of network failures after which a retry may succeed; and those without any answer.
PASSING_KINDS = ("Connect", "Request", "Timeout", "Interrupted")
#: URLs of machine credentials that the library tries; never named by a user.
METADATA = re.compile(r"//169\.254\.170\.2/|/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity")
NEXT = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket "
    "FSSPEC_S3='{\"anon\": true}'.",
    "gs": "Log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS.",
    **dict.fromkeys(
        AZURE, "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_USE_AZURE_CLI=true."
    ),
}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)|(certificate verify failed)")


class Truncated(Exception):
    """Raised if fewer bytes came than were requested."""


class Replaced(Exception):
    """Raised if the object was replaced since it was first looked at."""


class RangesUnsupported(Exception):
    """Raised if a server only sends whole files."""


class WrongAnswer(Exception):
    """Raised if an answer does not match the request: another range, or encoded bytes."""


class NoCredentials(Exception):
    """Raised if there are no credentials."""


class RedirectsAway(Exception):
    """Raised if a server redirects a URL with secrets to another server; has only that server's name."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _text(error: BaseException) -> str:
    """The texts of obstore's exceptions in the chain."""
    return next((str(each) for each in chain(error) if is_obstore(each)), "")


def is_obstore(error: BaseException) -> bool:
    """Whether obstore has raised it; some of its errors are Python's built-in types."""
    return type(error).__module__.startswith("obstore") or "\n\nDebug source:\n" in str(error)


def answer(error: BaseException) -> tuple[int, str]:
    """The status and the server's error code; zero and an empty string without an answer."""
    text = _text(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None:
        return int(status[1]), code[1] if code else ""
    numbers = (getattr(each, name, None) for each in chain(error) for name in ("status", "code"))
    return next((each for each in numbers if isinstance(each, int)), 0), ""


def kind_of(error: BaseException) -> str:
    """obstore's kind of a network failure; empty if it is none."""
    found = _KIND.search(_text(error))
    return found[1] if found else ""


def _certificate(error: BaseException) -> str:
    """Why the server's certificate is refused; empty if it is not."""
    found = _CERTIFICATE.search(_text(error) or "".join(str(each) for each in chain(error)))
    return (found[1] or found[2]) if found else ""


def is_passing(error: BaseException) -> bool:
    """Whether a retry may succeed."""
    if isinstance(error, ModelfuseError) or _certificate(error) or _asks_machine(error):
        return False
    status, code = answer(error)
    if status >= 400:
        return status in PASSING or code in PASSING_CODES
    return isinstance(error, Truncated | ConnectionError | TimeoutError) or kind_of(error) in PASSING_KINDS


def is_missing(error: BaseException) -> bool:
    """Whether the file does not exist."""
    status, _ = answer(error)
    return status in (404, 410) or (status == 0 and isinstance(error, FileNotFoundError))


def is_unranged(error: BaseException) -> bool:
    """Whether the server does not support ranges."""
    return isinstance(error, RangesUnsupported) or any(
        words in _text(error) for words in ("Range request not supported", "non-partial response")
    )


def _asks_machine(error: BaseException) -> bool:
    """Whether the last attempt was to get machine credentials, which most machines do not have."""
    return METADATA.search(_text(error).partition("\n\nDebug")[0]) is not None


def _wrong_answer(error: BaseException) -> str:
    """Why an answer does not match the request; empty if it does."""
    text = _text(error)
    if isinstance(error, WrongAnswer):
        return str(error)
    if "UnexpectedRange" in text:
        return "it sent another range than was requested"
    return "it sent a range without Content-Range" if "NoContentRange" in text or "ParseContentRange" in text else ""


def told(url: Url, error: BaseException, kind: type[ModelfuseError] = CheckpointError) -> BaseException:
    """Translate an exception of a store's library to the error to raise; bugs are returned unchanged."""
    if isinstance(error, ModelfuseError | LookupError | AttributeError | TypeError | NameError | AssertionError):
        return error
    status, code = answer(error)
    if isinstance(error, Replaced) or status == 412:
        return kind(
            f"{url} was changed while it was being read", "Wait until nothing writes to it any more, then merge again."
        )
    if is_unranged(error):
        return kind(f"{url} can only be fetched whole: its server ignores ranges", "Download it, and name the folder.")
    if wrong := _wrong_answer(error):
        return kind(f"{url}: the server gives a wrong answer: {wrong}", "Download it, and name the folder.")
    if isinstance(error, RedirectsAway):
        return kind(
            f"{url} redirects to {error}, which would receive the query of this URL",
            "Leave the query out if it is not needed, or use the URL that it redirects to.",
        )
    if code == "NoSuchBucket":
        return kind(f"{url}: there is no bucket {url.host}", "Check the URL, and the endpoint that is used.")
    if is_missing(error):
        return kind(f"{url} is missing", "Check the URL.")
    if isinstance(error, NoCredentials) or _asks_machine(error):
        return kind(f"{url} cannot be reached without credentials, and none are found", NEXT.get(url.scheme))
    if status in (401, 403) or isinstance(error, PermissionError):
        what = code or (f"status {status}" if status else _short(error))
        return kind(f"{url}: access is denied ({what})", NEXT.get(url.scheme, _denied(url)))
    return _way(url, error, kind)


def _denied(url: Url) -> str:
    if url.scheme not in ("http", "https"):
        return "Check the credentials."
    return "Check the credentials in the URL. Configured headers go only to hosts that you name yourself."


def _way(url: Url, error: BaseException, kind: type[ModelfuseError]) -> ModelfuseError:
    """The error for a server that cannot be reached, or does not speak the protocol."""
    (status, code), failure = answer(error), kind_of(error)
    setting = "AWS_ENDPOINT_URL_S3, if it is not AWS" if url.scheme == "s3" else "the URL"
    if why := _certificate(error):
        return kind(
            f"{url}: the server's certificate is refused ({why})",
            "If you trust who signed it, set SSL_CERT_FILE (for S3, AWS_CA_BUNDLE) to the file of their certificate.",
        )
    if failure == "Connect" or isinstance(error, ConnectionError):
        return kind(f"{url}: the server cannot be reached{_why(error)}", f"Check the network and {setting}.")
    if failure == "Timeout" or isinstance(error, TimeoutError):
        return kind(f"{url}: the server did not answer in time", f"Check the network and {setting}; then try again.")
    if failure == "Interrupted" or isinstance(error, Truncated):
        return kind(f"{url}: the server has closed the connection before all bytes came", "Try again.")
    if "BareRedirect" in _text(error):
        return kind(f"{url}: the bucket is in another region", "Set AWS_REGION to the region of the bucket.")
    if status:
        return kind(
            f"{url}: the server answered with status {status}{f' ({code})' if code else ''}",
            "Try again." if status in PASSING else f"Check {setting}.",
        )
    if "following redirect" in _text(error):
        return kind(f"{url}: the server redirects in circles, or to where no secrets may go", "Check the URL.")
    if "InvalidPathError" in type(error).__name__ or "with invalid path" in _text(error):
        return kind(f"{url}: an object's name is not a valid path", "Names may not have empty parts, '.' or '..'.")
    if is_obstore(error):
        return kind(f"{url}: the server's answer cannot be understood", f"Check {setting}.")
    return kind(f"{url}: {_short(error)}", "Try again." if is_passing(error) else None)


def _why(error: BaseException) -> str:
    """Why the connection failed, as far as the system says."""
    text = _text(error)
    if "dns error" in text:
        return ": there is no such host"
    return ": the connection is refused" if "ConnectionRefused" in text else ""


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
