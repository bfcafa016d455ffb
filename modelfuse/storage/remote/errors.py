"""What the libraries of stores raise, told apart without importing them, and in our words.

What a library says has whole URLs in it, with users, passwords and signatures. Of obstore's errors only the status, the
store's code and the kind of failure are taken, nothing else of them is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from modelfuse.errors import CheckpointError, ModelfuseError
from modelfuse.storage.url import AZURE, Url

#: Answers that another attempt may change.
PASSING = (408, 429, 500, 502, 503, 504)
#: Codes of S3 that mean the same, whatever the status.
PASSING_CODES = ("SlowDown", "RequestTimeout", "InternalError")
#: Kinds of failures on the way, as obstore calls them, after which another attempt may succeed; and without any answer.
PASSING_KINDS = ("Connect", "Request", "Timeout", "Interrupted")
#: Where the library looks for the credentials of a machine: nothing that a user names is there.
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
    """Raised where fewer bytes came than were asked for."""


class Replaced(Exception):
    """Raised where the object is no longer the one that was looked at."""


class RangesUnsupported(Exception):
    """Raised where a server sends whole files only."""


class WrongAnswer(Exception):
    """Raised where an answer is not the one to the question: another range, or bytes that are encoded."""


class NoCredentials(Exception):
    """Raised where nobody says who asks."""


class RedirectsAway(Exception):
    """Raised where a server sends a secret address on to another one, whose name is all that is said."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _text(error: BaseException) -> str:
    """What obstore says; nothing of what others say."""
    return next((str(each) for each in chain(error) if is_obstore(each)), "")


def is_obstore(error: BaseException) -> bool:
    """Whether it is one of obstore's errors, some of which are Python's own types."""
    return type(error).__module__.startswith("obstore") or "\n\nDebug source:\n" in str(error)


def answer(error: BaseException) -> tuple[int, str]:
    """The server's status and its own code; zero and nothing if there was no answer."""
    text = _text(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None:
        return int(status[1]), code[1] if code else ""
    numbers = (getattr(each, name, None) for each in chain(error) for name in ("status", "code"))
    return next((each for each in numbers if isinstance(each, int)), 0), ""


def kind_of(error: BaseException) -> str:
    """What obstore calls a failure on the way to a server; nothing if it was none."""
    found = _KIND.search(_text(error))
    return found[1] if found else ""


def _certificate(error: BaseException) -> str:
    """Why the certificate of a server is refused; nothing if it is not."""
    found = _CERTIFICATE.search(_text(error) or "".join(str(each) for each in chain(error)))
    return (found[1] or found[2]) if found else ""


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, ModelfuseError) or _certificate(error) or _asks_machine(error):
        return False
    status, code = answer(error)
    if status >= 400:
        return status in PASSING or code in PASSING_CODES
    return isinstance(error, Truncated | ConnectionError | TimeoutError) or kind_of(error) in PASSING_KINDS


def is_missing(error: BaseException) -> bool:
    """Whether there is nothing of that name."""
    status, _ = answer(error)
    return status in (404, 410) or (status == 0 and isinstance(error, FileNotFoundError))


def is_unranged(error: BaseException) -> bool:
    """Whether a server has sent something else than a part of a file."""
    return isinstance(error, RangesUnsupported) or any(
        words in _text(error) for words in ("Range request not supported", "non-partial response")
    )


def _asks_machine(error: BaseException) -> bool:
    """Whether credentials were looked for at last where only some machines have them."""
    return METADATA.search(_text(error).partition("\n\nDebug")[0]) is not None


def _wrong_answer(error: BaseException) -> str:
    """What was wrong with an answer that cannot be the one to the question."""
    text = _text(error)
    if isinstance(error, WrongAnswer):
        return str(error)
    if "UnexpectedRange" in text:
        return "another range came than was asked for"
    return "a range came without Content-Range" if "NoContentRange" in text or "ParseContentRange" in text else ""


def told(url: Url, error: BaseException, kind: type[ModelfuseError] = CheckpointError) -> BaseException:
    """The error to raise for what a store's library has raised; a bug stays what it is."""
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
            f"{url} leads on to {error}, which would be told the query of this address",
            "Leave the query out if it is no secret, or name the address that it leads to.",
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
    """The error for a server that cannot be reached, or not be talked to."""
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
        return kind(f"{url}: the server leads on in circles, or to where no secrets may go", "Check the URL.")
    if "InvalidPathError" in type(error).__name__ or "with invalid path" in _text(error):
        return kind(f"{url}: an object has a name that is no path", "Names may not have empty parts, '.' or '..'.")
    if is_obstore(error):
        return kind(f"{url}: the server cannot be understood", f"Check {setting}.")
    return kind(f"{url}: {_short(error)}", "Try again." if is_passing(error) else None)


def _why(error: BaseException) -> str:
    """What the system says of a connection that was not made."""
    text = _text(error)
    if "dns error" in text:
        return ": there is no host of that name"
    return ": the connection is refused" if "ConnectionRefused" in text else ""


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
