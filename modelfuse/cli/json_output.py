"""Write JSON documents to standard output."""

from __future__ import annotations

import sys

from msgspec import Struct, json

from modelfuse.printable import printable_json
from modelfuse.version import __version__


class Document(Struct, kw_only=True, frozen=True):
    """The fields of all documents.

    Attributes:
        modelfuse_version: The version that wrote it.
    """

    modelfuse_version: str = __version__


def write(document: Document) -> None:
    """Write a document to standard output."""
    text = json.format(json.encode(document, enc_hook=str), indent=2).decode()
    sys.stdout.write(printable_json(text) + "\n")
