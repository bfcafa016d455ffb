"""Which servers the user's own words name: the command line and calls of functions, and no file."""

from __future__ import annotations

import re
from collections.abc import Iterable

from modelfuse.storage.url import Url

_WEB_HOST = re.compile(r"https?://(?:[^/?#@,\s]*@)?([^/?#@,\s]+)", re.IGNORECASE)
_NAMED = set[str]()


def name_hosts(words: Iterable[object]) -> None:
    """Take note of the web servers in what the user has said: only these get headers that are configured.

    Others stand in files (recipes, reports), which anybody may have written.
    """
    for word in words:
        if isinstance(word, list | tuple):
            name_hosts(word)
        elif isinstance(word, Url):
            _NAMED.add(word.host.lower())
        elif isinstance(word, str):
            _NAMED.update(host.lower() for host in _WEB_HOST.findall(word))


def is_named(url: Url) -> bool:
    """Whether the user's own words name the server of a URL."""
    return url.host.lower() in _NAMED


def hosts_of(places: Iterable[object]) -> list[str]:
    """The stores that some places are in, without paths: buckets and servers."""
    return sorted({f"{place.scheme}://{place.host}" for place in places if isinstance(place, Url)})
