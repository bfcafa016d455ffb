"""Uploads to S3 that were never completed: those of a merge that was killed are aborted by the next one.

obstore aborts what fails while it runs, but can neither list uploads nor abort those of another process.
"""

from __future__ import annotations

import html
import re
import ssl
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

#: Signs a request: a method, the path of an object after the bucket with its slash, and a query.
Sign = Callable[[str, str, str], str]
#: Seconds that one request may take; the most bytes of a listing, which has a thousand uploads; and of listings.
SECONDS, MOST_BYTES, MOST_PAGES = 30.0, 4 << 20, 100


def abort_all(sign: Sign, client: Mapping[str, Any], folder: str) -> None:
    """Abort the uploads of files in a folder."""
    prefix = quote(f"{folder}/" if folder else "", safe="")
    for _ in range(MOST_PAGES):
        page = _ask(client, "GET", sign("GET", "", f"uploads=&delimiter=%2F&prefix={prefix}"))
        for upload in re.findall(r"<Upload>(.*?)</Upload>", page, re.DOTALL):
            key, number = (html.unescape(_text(upload, name)) for name in ("Key", "UploadId"))
            query = f"uploadId={quote(number, safe='')}"
            _ask(client, "DELETE", sign("DELETE", f"/{quote(key)}", query))
        if _text(page, "IsTruncated") != "true":
            return


def _text(xml: str, name: str) -> str:
    found = re.search(f"<{name}>(.*?)</{name}>", xml, re.DOTALL)
    return found[1] if found else ""


def _ask(client: Mapping[str, Any], method: str, address: str) -> str:
    """Make a request whose address is its signature."""
    request = urllib.request.Request(address, method=method)
    with urllib.request.urlopen(request, timeout=SECONDS, context=_trust(client, address)) as response:
        return str(response.read(MOST_BYTES).decode())


def _trust(client: Mapping[str, Any], address: str) -> ssl.SSLContext | None:
    """Whom obstore trusts for this store."""
    if not address.startswith("https:"):
        return None
    context = ssl.create_default_context()
    if (certificate := client.get("root_certificate")) is not None:
        context.load_verify_locations(cadata=certificate.decode())
    if client.get("allow_invalid_certificates"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
