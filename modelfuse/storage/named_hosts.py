"""Record which servers the user has named on the command line or in function calls (not in files)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from modelfuse.storage.url import Url

_WEB_HOST = re.compile(r"https?://(?:[^/?#@,\s]*@)?([^/?#@,\s]+)", re.IGNORECASE)
_NAMED = set[str]()


def name_hosts(words: Iterable[object]) -> None:
    """Record the web servers that the user has named: only these get configured headers.

    Others come from files (recipes, reports), which anybody may have written.
    """
    for word in words:
        if isinstance(word, list | tuple):
            name_hosts(word)
        elif isinstance(word, Url):
            _NAMED.add(word.host.lower())
        elif isinstance(word, str):
            _NAMED.update(host.lower() for host in _WEB_HOST.findall(word))


def is_named(url: Url) -> bool:
    """Whether the user has named the server of a URL."""
    return url.host.lower() in _NAMED


def hosts_of(paths: Iterable[object]) -> list[str]:
    """The buckets and servers of some paths or URLs, without their paths."""
    return sorted({f"{each.scheme}://{each.host}" for each in paths if isinstance(each, Url)})
