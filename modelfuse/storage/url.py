"""What a URL names, as words: nothing is asked of any store here."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field, replace

#: Schemes whose addresses end with a query; elsewhere a question mark is a letter of a name.
QUERIED = ("http", "https")
#: Two schemes of one kind of store.
SAME = {"s3a": "s3", "gcs": "gs"}
#: Azure's, where what stands before an @ is a container and no user.
AZURE = ("az", "abfs", "abfss")
#: Schemes that may be without a server: the one that is configured is meant.
WITHOUT_SERVER = ("memory", "hdfs", "webhdfs")
#: The kinds of stores. What else fsspec knows wraps other places (reference, dir, simplecache, …) and is no store.
KINDS = ("s3", "gs", *AZURE, "http", "https", "hdfs", "webhdfs", "ftp", "sftp", "smb", "oss", "memory")


@dataclass(frozen=True, slots=True, order=True)
class Url:
    """A file or folder of a store.

    As text it has neither user, password nor query, so that nothing secret is shown or recorded.

    Attributes:
        scheme: Which kind of store.
        host: The bucket, or the server with its port; of Azure, the container, with the account if the URL has it.
        path: What follows, without slashes around it.
        user: The user and the password, if the URL has them.
        query: What follows a question mark, such as a signature.
    """

    scheme: str
    host: str
    path: str
    user: str = field(default="", repr=False)
    query: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Url:
        """The parts of a URL.

        >>> str(Url.parse("https://me:secret@example.org/llama/model.safetensors?signature=1#top"))
        'https://example.org/llama/model.safetensors'

        Raises:
            ValueError: If it is of no store, or names no bucket or server.
        """
        scheme, _, rest = text.partition("://")
        scheme = SAME.get(scheme.lower(), scheme.lower())
        if scheme not in KINDS:
            raise ValueError(f"there is no kind of store that is called {scheme}; known are {', '.join(KINDS)}")
        query = ""
        if scheme in QUERIED:
            rest, _, query = rest.partition("#")[0].partition("?")
        place, _, path = rest.partition("/")
        user, at, host = ("", "", place) if scheme in AZURE else place.rpartition("@")
        if not host and scheme not in WITHOUT_SERVER:
            raise ValueError("this URL names no bucket or server")
        return cls(scheme, host, path.strip("/"), user + at, query)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.path}" if self.path else f"{self.scheme}://{self.host}"

    @property
    def address(self) -> str:
        """The whole URL, with what is secret of it."""
        text = f"{self.scheme}://{self.user}{self.host}/{self.path}"
        return f"{text}?{self.query}" if self.query else text

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        """The name from its last dot on."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> Url:
        """The folder that it is in."""
        return replace(self, path=posixpath.dirname(self.path))

    @property
    def parents(self) -> tuple[Url, ...]:
        """All folders that it is in, from the innermost."""
        return () if not self.path else (self.parent, *self.parent.parents)

    def __truediv__(self, name: str) -> Url:
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    def with_name(self, name: str) -> Url:
        """Another file in the same folder."""
        return self.parent / name

    def relative_to(self, folder: Url) -> str:
        """Its name from a folder on that it is in."""
        return self.path.removeprefix(f"{folder.path}/") if folder.path else self.path


@dataclass(frozen=True, slots=True)
class Entry:
    """What a store knows of a file.

    Attributes:
        size: Its length in bytes.
        version: Changes when it is written again: an entity tag, or whatever the store has.
        modified_ns: When it was written, in nanoseconds; zero if that is not known.
    """

    size: int
    version: str
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Version:
    """A file as it was when its store was first asked."""

    url: Url
    entry: Entry
