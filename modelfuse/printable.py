"""Text that strangers had a part in, made fit to be shown: no control characters, and no secrets of URLs.

Names, values and libraries' messages all come through here, whether an error is raised with them or a line is printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Self

#: C0 and C1 but for the ends of lines, marks that change the direction of text, and ends of lines that are not ours.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: The ends of lines that a message has itself: what it lists is indented.
_OTHER_END = re.compile(r"\n(?!  )")
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
#: Of a URL, the user and password; the query and fragment, which in some stores are letters of a name instead.
_USER = re.compile(r"(?<=://)(?<!\babfs://)(?<!\babfss://)[^\s/?#'\"<>]*@")
_QUERY = re.compile(
    r"\b((?!(?:s3a?|gc?s|az|abfss?|hdfs|memory)://)[a-zA-Z][a-zA-Z0-9+.-]*://[^\s?#'\"<>]*)[?#][^\s'\"<>]*"
)
#: What is sent with a request to prove who asks.
_TOKEN = re.compile(r"\b(Bearer|Basic) +[\w+/=.~-]{8,}|\bhf_\w{16,}")


class PrintableText(str):
    """Text fit to be shown, of one line or several: of control characters, only the ends of its lines are left."""

    __slots__ = ()

    @classmethod
    def of(cls, lines: Iterable[str]) -> Self:
        """Text of several lines, each of which is one, whatever it holds."""
        return cls("\n".join(map(one_line, lines)))


def printable(text: object) -> PrintableText:
    r"""Any text, fit to be shown.

    An end of a line stays one where an indented line follows, as in the lists of our messages.

    >>> printable("a\x1b[2Jb\nerror: c\n  d")
    'a\\x1b[2Jb\\nerror: c\n  d'
    >>> printable("https://me:secret@example.org/a?signature=b#c is missing")
    'https://example.org/a is missing'
    """
    if isinstance(text, PrintableText):
        return text
    plain = str(text)
    if "://" in plain:
        plain = _QUERY.sub(r"\1", _USER.sub("", plain))
    return PrintableText(_OTHER_END.sub(_escaped, _CONTROL.sub(_escaped, _TOKEN.sub("…", plain))))


def one_line(text: object) -> str:
    r"""The same in one line.

    >>> one_line("a\n  b")
    'a\\n  b'
    """
    return str(printable(str(text).replace("\n", r"\n")))


def printable_json(text: str) -> str:
    """JSON with no raw control characters but the ends of its own lines: those in its texts become escapes."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def is_printable(name: str) -> bool:
    """Whether a name has no control characters; no model's, tensor's or file's does, unless to deceive."""
    return "\n" not in name and _CONTROL.search(name) is None


def _escaped(match: re.Match[str]) -> str:
    letter = match[0]
    return _NAMED.get(letter) or (f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}")
