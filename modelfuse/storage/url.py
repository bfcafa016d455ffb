"""Parse URLs; no store is contacted here."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field, replace

#: Schemes whose URLs may have a query; elsewhere a question mark is part of a name.
QUERIED = ("http", "https")
#: Aliases of schemes.
SAME = {"s3a": "s3", "gcs": "gs"}
#: Azure's schemes, where the part before an @ is a container, not a user.
AZURE = ("az", "abfs", "abfss")
#: Schemes that may omit the server, for the configured one.
WITHOUT_SERVER = ("memory", "hdfs", "webhdfs")
#: The supported schemes. fsspec's others wrap other filesystems (reference, dir, simplecache, …).
KINDS = ("s3", "gs", *AZURE, "http", "https", "hdfs", "webhdfs", "ftp", "sftp", "smb", "oss", "memory")


@dataclass(frozen=True, slots=True, order=True)
class Url:
    """A file or folder of a store.

    Its text has no user, password or query, so that no secret is shown or recorded.

    Attributes:
        scheme: The kind of store.
        host: The bucket, or the server with its port; for Azure, the container, with the account if the URL has one.
        path: The path without leading and trailing slashes.
        user: User and password, if the URL has them.
        query: The part after a question mark, such as a signature.
    """

    scheme: str
    host: str
    path: str
    user: str = field(default="", repr=False)
    query: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Url:
        """Parse a URL.

        >>> str(Url.parse("https://me:secret@example.org/llama/model.safetensors?signature=1#top"))
        'https://example.org/llama/model.safetensors'

        Raises:
            ValueError: If the scheme is unknown, or there is no bucket or server.
        """
        scheme, _, rest = text.partition("://")
        scheme = SAME.get(scheme.lower(), scheme.lower())
        if scheme not in KINDS:
            raise ValueError(f"{scheme} is not a known kind of store; known are {', '.join(KINDS)}")
        query = ""
        if scheme in QUERIED:
            rest, _, query = rest.partition("#")[0].partition("?")
        authority, _, path = rest.partition("/")
        user, at, host = ("", "", authority) if scheme in AZURE else authority.rpartition("@")
        if not host and scheme not in WITHOUT_SERVER:
            raise ValueError("this URL names no bucket or server")
        return cls(scheme, host, path.strip("/"), user + at, query)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.path}" if self.path else f"{self.scheme}://{self.host}"

    @property
    def address(self) -> str:
        """The whole URL, including its secrets."""
        text = f"{self.scheme}://{self.user}{self.host}/{self.path}"
        return f"{text}?{self.query}" if self.query else text

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        """The suffix of the name, from its last dot on."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> Url:
        """The folder that it is in."""
        return replace(self, path=posixpath.dirname(self.path))

    @property
    def parents(self) -> tuple[Url, ...]:
        """All parent folders, from the innermost."""
        return () if not self.path else (self.parent, *self.parent.parents)

    def __truediv__(self, name: str) -> Url:
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    def with_name(self, name: str) -> Url:
        """Another file in the same folder."""
        return self.parent / name

    def relative_to(self, folder: Url) -> str:
        """Its path relative to a folder that contains it."""
        return self.path.removeprefix(f"{folder.path}/") if folder.path else self.path


@dataclass(frozen=True, slots=True)
class Entry:
    """What a store reports about a file.

    Attributes:
        size: The size in bytes.
        version: Identifies the version: an entity tag, or the store's equivalent.
        modified_ns: The modification time in nanoseconds; zero if unknown.
    """

    size: int
    version: str
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a file: the one that its store first reported."""

    url: Url
    entry: Entry
