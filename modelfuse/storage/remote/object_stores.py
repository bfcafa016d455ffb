"""S3, Google Cloud and Azure, through obstore.

obstore could retry requests itself, even within a body, but it would also retry refused certificates, and would not
show the headers of the second answer. So reads are retried here, and obstore's retries are used for uploads only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import obstore

from modelfuse.storage.remote import stores
from modelfuse.storage.remote.errors import Replaced, WrongAnswer, answer, is_missing
from modelfuse.storage.remote.stores import Content, Part, Store
from modelfuse.storage.url import Entry, Url

#: Parts of one file that are uploaded concurrently.
SENT_AT_ONCE = 8
#: Encodings of a body that leave its bytes as they are.
PLAIN = ("identity", "aws-chunked")


class ObjectStore(Store):
    """Queries and reads through obstore.

    Args:
        reader: obstore's store, with retries disabled.
    """

    def __init__(self, reader: Any) -> None:
        super().__init__()
        self._reader = reader

    def key(self, url: Url) -> str:
        """The key of a file in the store."""
        return url.path

    @staticmethod
    def entry_of(meta: Mapping[str, Any]) -> Entry:
        """Convert obstore's description of a file. Listings of some stores have entity tags without quotation marks."""
        tag, modified = meta["e_tag"], meta["last_modified"]
        seconds = int(modified.timestamp())  # Listings have fractions of seconds, headers do not.
        if tag and not tag.startswith(('"', "W/")):
            tag = f'"{tag}"'
        return Entry(meta["size"], tag or str(seconds), seconds * 10**9)

    def _ask(self, url: Url) -> Entry | None:
        try:
            return self.entry_of(obstore.head(self._reader, self.key(url)))
        except Exception as error:
            if is_missing(error) and answer(error)[1] != "NoSuchBucket":
                return None
            raise

    def _range(self, url: Url, entry: Entry, start: int, end: int) -> Content:
        options: dict[str, Any] = {"range": (start, end)}
        if condition := self._condition(entry):
            options["if_match"] = condition
        result = obstore.get(self._reader, self.key(url), options=options)
        now = self.entry_of(result.meta)
        if (now.size, now.version) != (entry.size, entry.version):  # Not every store supports conditional requests.
            raise Replaced
        if result.range != (start, end):
            raise WrongAnswer("it sent another range than was requested")
        encoding = str(result.attributes.get("Content-Encoding", "identity"))
        if not {each.strip().lower() for each in encoding.split(",")} <= {*PLAIN, ""}:
            raise WrongAnswer("it sent encoded bytes")
        return memoryview(result.bytes())

    def _condition(self, entry: Entry) -> str | None:
        """The condition that names the version in a request."""
        return entry.version if entry.version.startswith('"') else None


class Bucket(ObjectStore):
    """A bucket of S3 or Google Cloud, or a container of Azure.

    Args:
        kind: obstore's class.
        name: The bucket.
        config: Its configuration, beside the environment.
        client: Options of the HTTP client.
        credentials: The credential provider; None: obstore's own.
    """

    def __init__(
        self,
        kind: Any,
        name: str,
        config: Mapping[str, Any],
        client: Mapping[str, Any],
        credentials: Any = None,
    ) -> None:
        options = {"config": dict(config), "client_options": dict(client)}
        if credentials is not None:
            options["credential_provider"] = credentials
        super().__init__(kind(name, retry_config=attempts(1), **options))
        self._writer = kind(name, retry_config=attempts(stores.ATTEMPTS), **options)
        self._kind, self._name, self._options = kind, name, options

    def _list(self, folder: Url) -> dict[str, Entry | None]:
        # Some programs represent a folder by an object of its name.
        found = obstore.list_with_delimiter(self._reader, self.key(folder) or None)
        files = {
            _name(each["path"]): self.entry_of(each) for each in found["objects"] if each["path"] != self.key(folder)
        }
        return {**dict.fromkeys(map(_name, found["common_prefixes"])), **files}

    def put(self, url: Url, content: bytes) -> None:
        obstore.put(self._writer, self.key(url), content, use_multipart=False)

    def put_parts(self, url: Url, parts: Iterator[Part], size: int) -> None:
        obstore.put(
            self._writer, self.key(url), parts, use_multipart=True, chunk_size=size, max_concurrency=SENT_AT_ONCE
        )

    def _remove(self, url: Url) -> None:
        obstore.delete(self._reader, self.key(url))


class S3Bucket(Bucket):
    """A bucket of S3, whose unfinished uploads can be listed."""

    def clear(self, folder: Url) -> None:
        """Remove the parts of uploads to a folder that were never completed."""
        from modelfuse.storage.remote.unfinished_uploads import abort_all

        if not self._options["config"].get("skip_signature"):
            client = self._options["client_options"]
            self.together(folder, [lambda: abort_all(self._signed, client, self.key(folder))])

    def _signed(self, method: str, path: str, query: str) -> str:
        """A signed URL for a query. obstore cannot sign queries, but an endpoint may contain one.

        The object's name, which obstore appends, becomes the value of a parameter that S3 ignores.
        """
        config = self._options["config"]
        endpoint = f"{bucket_endpoint(self._name, config)}{path}?{query}&x-id="
        ours = {**config, "aws_endpoint_url_s3": endpoint, "virtual_hosted_style_request": True}
        signer = self._kind(self._name, retry_config=attempts(1), **{**self._options, "config": ours})
        return str(obstore.sign(signer, method, "modelfuse", timedelta(minutes=5)))


def bucket_endpoint(name: str, config: Mapping[str, Any]) -> str:
    """The endpoint of a bucket of S3, as obstore computes it."""
    endpoint, is_virtual = config.get("aws_endpoint_url_s3"), config.get("virtual_hosted_style_request")
    if endpoint is None:
        host = f"s3.{config['region']}.amazonaws.com"
        return f"https://{name}.{host}" if is_virtual else f"https://{host}/{name}"
    return endpoint if is_virtual else f"{endpoint.rstrip('/')}/{name}"


def attempts(number: int) -> dict[str, Any]:
    """obstore's options for the number of attempts of a request."""
    return {
        "max_retries": number - 1,
        "retry_timeout": timedelta(seconds=stores.SECONDS),
        "backoff": {"init_backoff": timedelta(seconds=stores.PAUSE)},
    }


def connecting(**more: Any) -> dict[str, Any]:
    """Client options with time limits: to connect, between reads, and for a whole request."""
    limits = {"connect_timeout": timedelta(seconds=10), "read_timeout": timedelta(seconds=30)}
    return {**limits, "timeout": timedelta(seconds=stores.SECONDS), "user_agent": "modelfuse", **more}


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
